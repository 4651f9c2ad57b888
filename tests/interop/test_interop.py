"""Our models in mlx-lm and transformers, and theirs here: equal token ids, logits and EOS."""
import json
import subprocess
import sys

import mlx_pretrain  # noqa: F401, I001 - before MLX, and so before mlx_lm

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_map
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from mlx_pretrain.generate import generate
from mlx_pretrain.model import Llama, LlamaArgs, RopeScaling, rope_freqs, scale_rope_freqs
from mlx_pretrain.optim import SGD, Adam, AdamW, Muon
from mlx_pretrain.pretrained import PretrainedError, export, load
from mlx_pretrain.tokenizer import ByteTokenizer, train_sentencepiece

transformers.logging.set_verbosity_error()
TEXTS = ["", " ", "  ", "   \n", "\n", "\n\n", " a", "a ", "a  b", "Hello, world!", "tabs\tand\r\nlines",
         "Zürich, naïve café", "🦙", "👩\u200d👩\u200d👧 family",
         "你好，世界", "a\u0301", "\u2028 and \u00a0",
         "zero\x00byte", "def f(x):\n    return x ** 2\n", "1234567890", "…“quotes”…",
         "The state of the union is strong.\n\nMy fellow citizens:", "İstanbul ﬁne ㎏", "\ufeffmark",
         "x" * 300]
LLAMA3 = dict(type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)
KINDS = {
    "byte-tied-gqa": ("byte", {}),
    "byte-padded-vocabulary": ("byte", {"vocab_size": 320}),
    "sentencepiece-untied-llama3": (
        "sentencepiece",
        {"tie_word_embeddings": False, "rope_scaling": RopeScaling(**LLAMA3), "rope_theta": 5e5},
    ),
    "sentencepiece-tied-linear": ("sentencepiece", {"rope_scaling": RopeScaling(type="linear", factor=4.0)}),
    "byte-biases-traditional": (
        "byte",
        {"attention_bias": True, "mlp_bias": True, "rope_traditional": True, "head_dim": 32},
    ),
}

SIZES = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=256)


def lively(**sizes):
    model = Llama(LlamaArgs(**{**SIZES, "head_dim": 16, **sizes}), seed=1)
    return model.update(tree_map(lambda w: 4 * w if w.ndim > 1 else w + 0.1, model.parameters()))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    lines = [
        "My fellow citizens: the state of the union is strong.\n\n"
        "The llama  eats 1,234 blades of grass; naïve café, Zürich."
    ] * 30
    return {"byte": ByteTokenizer(),
            "sentencepiece": train_sentencepiece(lines, 350, tmp_path_factory.mktemp("sp"))}


@pytest.fixture(scope="module", params=KINDS)
def ours(request, tokenizers, tmp_path_factory):
    "Model, tokenizer and exported directory of one kind."
    name, sizes = KINDS[request.param]
    tokenizer = tokenizers[name]
    model = lively(**{"vocab_size": tokenizer.vocab_size, **sizes})
    directory = tmp_path_factory.mktemp("model")
    export(model, tokenizer, directory)
    return model, tokenizer, directory


def ids_of(model, n=40):
    return np.random.default_rng(0).integers(0, model.args.vocab_size, (2, n)).astype(np.int32)


def close(theirs, model, ids):
    want = np.array(model(mx.array(ids)))
    assert np.abs(want).max() > 1                                         # logits that are not trivial
    assert np.abs(np.asarray(theirs) - want).max() < 2e-5 * np.abs(want).max()


def torch_logits(model, ids):
    with torch.no_grad(): return model(torch.tensor(ids, dtype=torch.long)).logits.float().numpy()


# ---- our models elsewhere

def test_logits_in_mlx_lm(ours):
    model, _, directory = ours
    theirs, _ = mlx_lm.load(str(directory))
    ids = ids_of(model)
    close(theirs(mx.array(ids)), model, ids)


def test_logits_in_transformers(ours):
    model, _, directory = ours
    theirs, report = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(report.values()), report  # no weight missing, unknown or of another shape
    assert isinstance(theirs, LlamaForCausalLM) and theirs.dtype == torch.float32
    ids = ids_of(model)
    close(torch_logits(theirs, ids), model, ids)


def test_planted_missing_rope_scaling_is_detected(tokenizers, tmp_path):
    "Planted bug: without `rope_scaling`, mlx-lm does not scale RoPE, and the logits differ."
    model = lively(vocab_size=259, rope_scaling=RopeScaling(**LLAMA3))
    export(model, tokenizers["byte"], tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps({k: v
                                                        for k, v in config.items() if k != "rope_scaling"}))
    theirs, _ = mlx_lm.load(str(tmp_path / "m"))
    ids = ids_of(model)
    with pytest.raises(AssertionError): close(theirs(mx.array(ids)), model, ids)


def test_ids(ours):
    _, tokenizer, directory = ours
    for theirs in (AutoTokenizer.from_pretrained(directory), mlx_lm.load(str(directory))[1]):
        for text in TEXTS:
            want = tokenizer.encode(text)
            assert theirs.encode(text, add_special_tokens=False) == want, text
            assert theirs.encode(text) == [tokenizer.bos_id, *want], text
            assert theirs.decode(want) == text == tokenizer.decode(want)
        assert (theirs.bos_token_id, theirs.eos_token_id,
                theirs.pad_token_id) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
        assert theirs.decode([tokenizer.bos_id, *tokenizer.encode("hé"), tokenizer.eos_id],
                             skip_special_tokens=True) == "hé"


def test_ids_of_any_text(ours):
    """Random characters, and words of the training text.

    transformers reads SentencePiece's ▁ as a space; here it is kept.
    """
    _, tokenizer, directory = ours
    theirs = AutoTokenizer.from_pretrained(directory)
    letters = st.characters(exclude_categories=["Cs"], exclude_characters="▁")
    words = st.sampled_from(["union", " the", "  ", "\n", "state of", "1,23", "é", "llama", " "])

    @settings(deadline=None, max_examples=300, suppress_health_check=list(HealthCheck))
    @given(st.lists(letters | words, max_size=20).map("".join))
    def check(text): assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)
    check()
    assert tokenizer.decode(tokenizer.encode("snake▁case")) == "snake▁case"


@pytest.fixture(scope="module", params=["byte", "sentencepiece"])
def stopper(request, tokenizers, tmp_path_factory):
    "A model whose greedy tokens are known, the sixth of them EOS."
    tokenizer = tokenizers[request.param]
    prompt = [tokenizer.bos_id, *tokenizer.encode("My fellow")]
    how = dict(max_new_tokens=20, eos_ids=[], pad_id=tokenizer.pad_id, temperature=0)
    for seed in range(100):
        model = lively(vocab_size=tokenizer.vocab_size, tie_word_embeddings=False)
        model.lm_head.weight = mx.random.normal(model.lm_head.weight.shape, key=mx.random.key(seed))
        generated = np.array(generate(model, [prompt], **how).tokens)[0].tolist()
        if generated[5] not in generated[:5] and tokenizer.eos_id not in generated[:6]: break
    order = np.arange(tokenizer.vocab_size)
    order[[generated[5], tokenizer.eos_id]] = tokenizer.eos_id, generated[5]     # the sixth token becomes EOS
    model.lm_head.weight = model.lm_head.weight[mx.array(order)]
    directory = tmp_path_factory.mktemp("stopper")
    export(model, tokenizer, directory)
    return model, tokenizer, directory, prompt, [*generated[:5], tokenizer.eos_id]


def test_eos_stops_here(stopper):
    model, tokenizer, _, prompt, generated = stopper
    out = generate(model, [prompt], 20, eos_ids=[tokenizer.eos_id], pad_id=tokenizer.pad_id, temperature=0)
    assert np.array(out.tokens)[np.array(out.response_mask)].tolist() == generated


def test_eos_stops_in_mlx_lm(stopper):
    _, tokenizer, directory, prompt, generated = stopper
    model, theirs = mlx_lm.load(str(directory))
    assert set(theirs.eos_token_ids) == {tokenizer.eos_id}
    *_, last = steps = list(mlx_lm.stream_generate(model, theirs, prompt, max_tokens=20))
    assert last.finish_reason == "stop" and [s.token for s in steps] == generated


def test_eos_stops_in_transformers(stopper):
    _, _, directory, prompt, generated = stopper
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert model.generate(torch.tensor([prompt]), max_new_tokens=20,
                          do_sample=False)[0].tolist() == prompt + generated


# ---- other models here

ROPES = {"default": {"rope_type": "default", "rope_theta": 10_000.0},
         "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
         "llama3": {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0, "original_max_position_embeddings": 32}, }


def transformers_model(rope, **more):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=259, rope_parameters=dict(ROPES[rope]), initializer_range=0.15,
                         bos_token_id=257, eos_token_id=258, pad_token_id=256, **SIZES, **more)
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("more,shard", [
    ({}, "40KB"), ({"tie_word_embeddings": True}, "10GB"),
    ({"attention_bias": True, "mlp_bias": True, "head_dim": 32}, "40KB")])
def test_models_saved_by_transformers(rope, more, shard, tmp_path):
    theirs = transformers_model(rope, **more)
    with torch.no_grad():
        for w in theirs.parameters():
            if w.ndim == 1: w.add_(0.1 * torch.randn(w.shape))            # gains and biases that matter
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    ByteTokenizer().save(tmp_path)
    files = list(tmp_path.glob("model*.safetensors"))
    assert (len(files) > 2) == (shard == "40KB")
    opened = load(tmp_path).model
    ids = ids_of(opened)
    close(torch_logits(theirs, ids), opened, ids)


def test_bfloat16_of_transformers(tmp_path):
    transformers_model("llama3").to(torch.bfloat16).save_pretrained(tmp_path)
    ByteTokenizer().save(tmp_path)
    opened = load(tmp_path).model
    ids = ids_of(opened)
    close(torch_logits(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), ids), opened, ids)


def test_saved_again_by_transformers(ours, tmp_path):
    "Round trip: model and tokenizer as transformers saves them."
    model, tokenizer, directory = ours
    AutoModelForCausalLM.from_pretrained(directory).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(directory).save_pretrained(tmp_path)
    back = load(tmp_path)
    ids = ids_of(model)
    close(back.model(mx.array(ids)), model, ids)
    for text in TEXTS: assert back.tokenizer.encode(text) == tokenizer.encode(text), text
    assert (back.tokenizer.bos_id, back.tokenizer.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)


def convert(*words):
    subprocess.run([sys.executable, "-c", "import mlx_pretrain; from mlx_lm.convert import main; main()",
                    *map(str, words)], check=True, capture_output=True, text=True)


def test_quantized_model_is_refused_and_the_remedy_works(tokenizers, tmp_path):
    model = lively(vocab_size=259, num_hidden_layers=1)
    export(model, tokenizers["byte"], tmp_path / "m")
    convert("--hf-path", tmp_path / "m", "--mlx-path", tmp_path / "q", "-q", "--q-group-size", 32, "--q-bits",
            8)
    with pytest.raises(PretrainedError, match="--dequantize") as caught: load(tmp_path / "q")
    assert f"mlx_lm.convert --hf-path '{tmp_path / 'q'}' --mlx-path OUT --dequantize" in str(caught.value)
    convert("--hf-path", tmp_path / "q", "--mlx-path", tmp_path / "d", "--dequantize")
    back, ids = load(tmp_path / "d").model, ids_of(model)
    error = mx.abs(back(mx.array(ids)) - model(mx.array(ids))).max() / mx.abs(model(mx.array(ids))).max()
    assert error.item() < 0.1                                             # eight bits


# ---- positions

@pytest.mark.parametrize("head_dim", [8, 64, 128])
@pytest.mark.parametrize("rope", ROPES)
def test_rope_freqs(rope, head_dim):
    spelled = dict(ROPES[rope])
    config = LlamaConfig(hidden_size=4 * head_dim, num_attention_heads=4, rope_parameters=dict(spelled),
                         max_position_embeddings=8192)
    theta, kind = spelled.pop("rope_theta"), spelled.pop("rope_type")
    scaling = RopeScaling() if kind == "default" else RopeScaling(type=kind, **spelled)
    ours = 1 / np.array(scale_rope_freqs(rope_freqs(head_dim, theta), scaling))
    np.testing.assert_allclose(ours, LlamaRotaryEmbedding(config).inv_freq.numpy(), rtol=2e-6)


def test_real_llama3_scaling():
    "Llama 3.1's own numbers, far beyond its first context."
    spelled = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}
    config = LlamaConfig(hidden_size=512, num_attention_heads=4, max_position_embeddings=131072,
                         rope_parameters={"rope_type": "llama3", "rope_theta": 500_000.0, **spelled})
    ours = 1 / np.array(scale_rope_freqs(rope_freqs(128, 500_000.0), RopeScaling(type="llama3", **spelled)))
    np.testing.assert_allclose(ours, LlamaRotaryEmbedding(config).inv_freq.numpy(), rtol=2e-6)


# ---- optimizers

def optimizer_example(shape, steps=20):
    "A parameter and its gradients."
    rng = np.random.default_rng(0)
    return rng.normal(size=shape).astype(np.float32), rng.normal(size=(steps, *shape)).astype(np.float32)


def walk_ours(opt, w, grads):
    p = {"w": mx.array(w)}
    for g in grads: p = opt.apply_gradients({"w": mx.array(g)}, p)
    return np.array(p["w"])


def walk_torch(opt, w, grads, **arguments):
    p = torch.nn.Parameter(torch.tensor(w))
    opt = opt([p], lr=0.01, **arguments)
    for g in grads:
        p.grad = torch.tensor(g)
        opt.step()
    return p.detach().numpy()


TWINS = {"adamw": (lambda: AdamW(0.01, (0.9, 0.95), 1e-8, 0.1), torch.optim.AdamW, {"betas": (0.9, 0.95)}),
         "adamw, long memory": (lambda: AdamW(0.01, (0.9, 0.999), 1e-5, 0.1), torch.optim.AdamW,
                                {"betas": (0.9, 0.999), "eps": 1e-5}),
         "adam": (lambda: Adam(0.01, (0.9, 0.95), 1e-8, 0.1), torch.optim.Adam, {"betas": (0.9, 0.95)}),
         "sgd": (lambda: SGD(0.01, 0.9, 0.1), torch.optim.SGD, {"momentum": 0.9}), }


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("shape", [(8, 8), (12, 5), (7,)])
def test_optimizers_match_torch(name, shape):
    "Twenty steps; torch decays vectors too, so there its decay is 0."
    ours, theirs, arguments = TWINS[name]
    w, grads = optimizer_example(shape)
    walked = walk_ours(ours(), w, grads)
    decay = 0.1 if len(shape) > 1 else 0.0
    np.testing.assert_allclose(walked, walk_torch(theirs, w, grads, weight_decay=decay, **arguments),
                               atol=2e-6)
    # with the other decay
    assert np.abs(walked - walk_torch(theirs, w, grads, weight_decay=0.1 - decay, **arguments)).max() > 1e-3


MUON = dict(momentum=0.95, adjust_lr_fn="match_rms_adamw")


@pytest.mark.parametrize("shape", [(8, 8), (5, 12), (12, 5), (64, 160)])
def test_muon_steps_alike(shape, monkeypatch):
    """Torch orthogonalises in bfloat16, with about three digits; ours are as close as that allows, and to
    float32's rounding where it
    is made to use float32."""
    w, grads = optimizer_example(shape, steps=5)
    ours, still = walk_ours(Muon(0.01, 0.95, 0.1), w, grads), w * (1 - 0.01 * 0.1) ** 5
    coarse = walk_torch(torch.optim.Muon, w, grads, weight_decay=0.1, **MUON)
    assert np.linalg.norm(ours - coarse) < 0.03 * np.linalg.norm(ours - still)
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda x: x.clone())
    np.testing.assert_allclose(ours, walk_torch(torch.optim.Muon, w, grads, weight_decay=0.1, **MUON),
                               atol=1e-5)
    for wrong in (
        {"weight_decay": 0.0},
        {"nesterov": False},
        {"momentum": 0.9},
        {"adjust_lr_fn": "original"},
    ):
        other = walk_torch(torch.optim.Muon, w, grads, **{"weight_decay": 0.1, **MUON, **wrong})
        assert np.abs(ours - other).max() > 3e-4                          # thirty times the tolerance
