"A reward model in transformers: the same numbers, padded on the right; and one of theirs here."
import mlx_pretrain  # noqa: F401, I001 (before MLX)

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_map
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from mlx_pretrain.model import LlamaArgs, ScalarLlama
from mlx_pretrain.preferences import lay_beside
from mlx_pretrain.pretrained import export, load
from mlx_pretrain.prompt import PromptFormat
from mlx_pretrain.reward_model import TrainedReward, load_reward, make_scorer
from mlx_pretrain.tokenizer import ByteTokenizer

SIZES = dict(vocab_size=259, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
TEXTS = [[257, 5, 6, 7, 258], [257, 9, 258], [257, *range(20, 60), 258]]


def lively(**more):
    "A reward model whose parts all matter."
    model = ScalarLlama(LlamaArgs(**SIZES, head_dim=16, **more))
    return model.update(tree_map(lambda w: 0.1 * mx.random.normal(w.shape, key=mx.random.key(w.size)) + (w if w.ndim < 2 else 0),
                                 model.parameters()))


def theirs(model, texts, pad_id):
    "What transformers says about some texts in one batch."
    tokens, mask = lay_beside(texts, pad_id)
    with torch.no_grad(): return model(torch.tensor(tokens).long(), attention_mask=torch.tensor(mask).long()).logits[:, 0].numpy()


@pytest.mark.parametrize("more", [{}, {"tie_word_embeddings": False, "rope_traditional": True, "attention_bias": True}])
def test_transformers_gives_the_same_numbers(more, tmp_path):
    ours, tok = lively(**more), ByteTokenizer()
    TrainedReward(ours, tok, PromptFormat(), mean=3.0, std=2.0).save(tmp_path / "m")
    model, report = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m", dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report                               # no weight missing, unknown or of another shape
    assert model.config.num_labels == 1 and model.config.pad_token_id == tok.pad_id
    scores = make_scorer(ours, tok.pad_id)(TEXTS)
    assert np.abs(theirs(model, TEXTS, tok.pad_id) - scores).max() < 2e-5 * max(1, np.abs(scores).max())
    assert np.ptp(scores) > 0.1
    assert np.allclose(load_reward(tmp_path / "m").scores(TEXTS), scores, atol=1e-5)


def test_one_of_transformers_opens_here(tmp_path):
    torch.manual_seed(0)
    tok = ByteTokenizer()
    config = LlamaConfig(**SIZES, head_dim=16, num_labels=1, pad_token_id=tok.pad_id, bos_token_id=tok.bos_id, eos_token_id=tok.eos_id)
    model = LlamaForSequenceClassification(config).eval()
    with torch.no_grad():
        for w in model.parameters(): w.add_(0.1 * torch.randn_like(w))
    export(lively(), tok, tmp_path / "m")                                 # the tokenizer's files
    (tmp_path / "m/model.safetensors").unlink()
    model.save_pretrained(tmp_path / "m")
    opened = load(tmp_path / "m", ScalarLlama).model
    scores = theirs(model, TEXTS, tok.pad_id)
    assert np.abs(make_scorer(opened, tok.pad_id)(TEXTS) - scores).max() < 2e-5 * max(1, np.abs(scores).max())
