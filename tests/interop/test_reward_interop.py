"A reward model in transformers: the same numbers, padded on the right; and one of theirs here."
import mlx_pretrain  # noqa: F401, I001 (before MLX)

import json

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_map
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification,
    PreTrainedTokenizerFast)

from mlx_pretrain.chat import prompt_pieces
from mlx_pretrain.prompts import read_prompts
from mlx_pretrain.model import Llama, LlamaArgs, ScalarLlama
from mlx_pretrain.preferences import pad_right, read_preferences, encode_prompt_response
from mlx_pretrain.pretrained import export, load
from mlx_pretrain.prompt import PromptFormat, encode_pieces, pair_pieces
from mlx_pretrain.reward import RewardConfig, train_reward
from mlx_pretrain.reward_model import TrainedReward, load_reward, make_scorer
from mlx_pretrain.score import score
from mlx_pretrain.tokenizer import ByteTokenizer, load_tokenizer

SIZES = dict(vocab_size=259, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2)
TEXTS = [[257, 5, 6, 7, 258], [257, 9, 258], [257, *range(20, 60), 258]]


def lively(**more):
    "A reward model whose parts all matter."
    model = ScalarLlama(LlamaArgs(**{**SIZES, **more}, head_dim=16))
    return model.update(
        tree_map(
            lambda w: 0.1 * mx.random.normal(w.shape, key=mx.random.key(w.size)) + (w if w.ndim < 2 else 0),
            model.parameters(),
        )
    )


def theirs(model, texts, pad_id):
    "What transformers says about some texts in one batch."
    tokens, mask = pad_right(texts, pad_id)
    with torch.no_grad():
        return model(torch.tensor(tokens).long(),
                     attention_mask=torch.tensor(mask).long()).logits[:, 0].numpy()


@pytest.mark.parametrize("more", [
    {}, {"tie_word_embeddings": False, "rope_traditional": True, "attention_bias": True}])
def test_transformers_gives_the_same_numbers(more, tmp_path):
    ours, tok = lively(**more), ByteTokenizer()
    TrainedReward(ours, tok, PromptFormat(), mean=3.0, std=2.0).save(tmp_path / "m")
    model, report = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "m", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report  # no weight missing, unknown or of another shape
    assert model.config.num_labels == 1 and model.config.pad_token_id == tok.pad_id
    scores = make_scorer(ours, tok.pad_id)(TEXTS)
    assert np.abs(theirs(model, TEXTS, tok.pad_id) - scores).max() < 2e-5 * max(1, np.abs(scores).max())
    assert np.ptp(scores) > 0.1
    assert np.allclose(load_reward(tmp_path / "m").scores(TEXTS), scores, atol=1e-5)


def test_one_of_transformers_opens_here(tmp_path):
    torch.manual_seed(0)
    tok = ByteTokenizer()
    config = LlamaConfig(**SIZES, head_dim=16, num_labels=1, pad_token_id=tok.pad_id, bos_token_id=tok.bos_id,
                         eos_token_id=tok.eos_id)
    model = LlamaForSequenceClassification(config).eval()
    with torch.no_grad():
        for w in model.parameters(): w.add_(0.1 * torch.randn_like(w))
    export(lively(), tok, tmp_path / "m")                                 # the tokenizer's files
    (tmp_path / "m/model.safetensors").unlink()
    model.save_pretrained(tmp_path / "m")
    opened = load(tmp_path / "m", ScalarLlama).model
    scores = theirs(model, TEXTS, tok.pad_id)
    assert np.abs(make_scorer(opened, tok.pad_id)(TEXTS) - scores).max() < 2e-5 * max(1, np.abs(scores).max())


# ---- through a chat template

SPECIAL = ("<|pad|>", "<|im_start|>", "<|im_end|>")
CHATML = ("{% for m in messages %}"
          "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
NOTES = (
    "The old man counts the boats. Who counts the gulls? Name a bird: a gull, a crow. "
    "Q: Name a bird. A: The gull. "
    * 4
)


def bpe(folder, template=CHATML, bos=None):
    "A tokenizer with merges, across the ends of words too, as transformers saves it."
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words.train_from_iterator([NOTES], trainers.BpeTrainer(vocab_size=340, special_tokens=list(SPECIAL),
                                                           initial_alphabet=alphabet))
    tok = PreTrainedTokenizerFast(tokenizer_object=words, pad_token=SPECIAL[0], bos_token=bos,
                                  eos_token=SPECIAL[2])
    tok.chat_template = template
    tok.save_pretrained(folder)
    return tok


def message(role, content): return {"role": role, "content": content}


CONVERSATIONS = [[message("user", "Name a bird.")],
                 [message("user", "Name a bird."), message("assistant", "A crow."),
                  message("user", "Who counts the gulls?")],
                 [message("system", "Be brief."), message("user", "Name a bird.")],
                 [message("system", "Be brief."), message("user", "Q"), message("assistant", "A: The gull."),
                  message("user", "  Name\n a bird: ")]]
ANSWERS = ["A gull.", "", "  The old man counts\n", "é 🙂"]


def by_transformers(folder, conversations, answers):
    "The logits of answers to conversations, by the chat template of the model, and the token ids."
    tok = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    whole = [[*talk, message("assistant", answer)]
             for talk, answer in zip(conversations, answers, strict=True)]
    ids = [tok.apply_chat_template(talk, tokenize=True, return_dict=True)["input_ids"] for talk in whole]
    with torch.no_grad(): return np.array([model(torch.tensor([row])).logits.item() for row in ids]), ids


def of_trl(folder, template=CHATML):
    "A reward model as TRL's RewardTrainer leaves one."
    torch.manual_seed(0)
    tok = bpe(folder, template)
    config = LlamaConfig(**{**SIZES, "vocab_size": len(tok)}, head_dim=16, num_labels=1,
                         pad_token_id=tok.pad_token_id, eos_token_id=tok.eos_token_id)
    model = LlamaForSequenceClassification(config)
    with torch.no_grad():
        for w in model.parameters(): w.add_(0.1 * torch.randn_like(w))
    model.save_pretrained(folder)
    return folder


def text_of(tok, fmt):
    "The first conversation as a policy of that format sees it."
    return tok.decode(encode_pieces(tok, [prompt_pieces(fmt, tok, {"instruction": "Name a bird."})])[0].ids)


def near(ours, theirs): return np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()


DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou judge birds.<|im_end|>\n' }}{% endif %}"
    + CHATML
)
TRIMMED = CHATML.replace("m['content']", "m['content'] | trim").replace("+ '\n' }}{% endfor", "}}{% endfor")


@pytest.mark.parametrize("template", [CHATML, DEFAULT_SYSTEM, TRIMMED],
                         ids=["ChatML", "its own system prompt", "trims"])
def test_a_chat_reward_model_of_trl_is_read_by_its_template(template, tmp_path):
    "Ids and rewards equal transformers': one turn or several, with or without a system turn, empty answers."
    folder = of_trl(tmp_path / "rm", template)
    judge = load_reward(folder)
    talks = CONVERSATIONS * 4
    answers = [answer for answer in ANSWERS for _ in CONVERSATIONS]
    wanted, ids = by_transformers(folder, talks, answers)
    texts = ["whatever the policy saw"] * len(talks)
    assert encode_prompt_response(judge.tokenizer, judge.format, texts, answers, talks) == ids
    assert near(judge.compute_reward(texts, answers, talks), wanted) and np.ptp(wanted) > 0.1
    seen = text_of(judge.tokenizer, judge.format)
    assert near(judge.compute_reward([seen], ["A gull."]), wanted[:1])    # where PPO knows the text alone
    old = encode_pieces(judge.tokenizer, [pair_pieces(judge.tokenizer, seen, "A gull.")])[0].ids
    assert not near(judge.scores([old]), wanted[:1])  # negative control: without special tokens


@pytest.mark.parametrize("system", [None, "You judge birds."])
def test_ours_trained_on_a_chat_model_is_read_the_same_by_transformers(system, tmp_path):
    "From `mlx-pretrain reward` to `apply_chat_template`, and in PPO, whose policy has no template."
    tok = bpe(tmp_path / "chat")
    export(Llama(LlamaArgs(**{**SIZES, "vocab_size": len(tok)}, head_dim=16)),
           load_tokenizer(tmp_path / "chat"), tmp_path / "base", PromptFormat(prompt_format=None))
    rows = [{"prompt": talk, "chosen": "A gull.", "rejected": "The boats."} for talk in CONVERSATIONS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = {"name": "rm", "pretrained_model": str(tmp_path / "base"),
           "data": {"input_file": str(tmp_path / "rows.jsonl"), "response_length": 4,
                    "normalization_samples": 8, "system_prompt": system},
           "training": {"hyperparameters": {"batch_size": 4, "iters": 4, "learning_rate": 1e-2}}}
    run = train_reward(RewardConfig.model_validate_json(json.dumps(cfg)), tmp_path / "runs")
    judge = load_reward(run)
    wanted, ids = by_transformers(run / "model", CONVERSATIONS, ANSWERS)
    scores = judge.compute_reward([""] * 4, ANSWERS, CONVERSATIONS) * judge.std + judge.mean
    assert near(scores, wanted) and np.ptp(wanted) > 1e-3
    trained = read_preferences(tmp_path / "rows.jsonl", judge.tokenizer, judge.format, 500)
    assert trained.chosen == by_transformers(run / "model", CONVERSATIONS, ["A gull."] * 4)[1]
    fmt = PromptFormat(prompt_format="<{instruction}>", input_field="prompt")
    asked = read_prompts(tmp_path / "rows.jsonl", ByteTokenizer(), fmt, 500, 4)
    by_ppo = score(judge, [""] * 4, ANSWERS, asked.columns(range(4))) * judge.std + judge.mean
    assert near(by_ppo, wanted) and (system is None) == ("birds" not in judge.tokenizer.decode(ids[0]))


FORMATS = [PromptFormat(prompt_format="Q: {instruction}\nA:", response_format=" {response}."),
           PromptFormat(prompt_format="Q: {instruction} A: The ", response_format="{response} of the boats",
                        system_prompt="Be brief."),
           PromptFormat(prompt_format="{system_prompt}\nName a {instruction}", response_format="{response}",
                        system_prompt="Q")]


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.response_format)
@pytest.mark.parametrize("bos", [None, "<|im_start|>"])
def test_ours_in_a_prompt_format_is_read_the_same_by_transformers(fmt, bos, tmp_path):
    "By the exported chat template: the same ids, with the text around the response, and the same rewards."
    bpe(tmp_path / "tok", None, bos)
    tok = load_tokenizer(tmp_path / "tok")
    made = TrainedReward(lively(vocab_size=tok.vocab_size), tok, fmt, mean=0.5, std=2.0)
    made.save(tmp_path / "m")
    wanted, ids = by_transformers(tmp_path / "m", CONVERSATIONS, ANSWERS)
    assert encode_prompt_response(tok, fmt, [""] * 4, ANSWERS, CONVERSATIONS) == ids
    assert near(load_reward(tmp_path / "m").compute_reward([""] * 4, ANSWERS, CONVERSATIONS) * 2 + 0.5,
                wanted)
    # where PPO knows the text alone
    assert encode_prompt_response(tok, fmt, [text_of(tok, fmt)], ANSWERS[:1]) == ids[:1]
