"""Loading and exporting models: both layouts, invalid directories, and failed writes."""
import json
import os
import random
import shutil
from pathlib import Path

import mlx_pretrain  # noqa: F401, I001 - before MLX, as everywhere

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_map

from common import check_sentence
from mlx_pretrain.config import UserError
from mlx_pretrain.model import Llama, LlamaArgs, RopeScaling
from mlx_pretrain.pretrained import PretrainedError, args_from_hf, args_to_hf, export, load
from mlx_pretrain.prompt import PromptFormat
from mlx_pretrain.run import ResumeConfig, Run, RunError, find_checkpoint
from mlx_pretrain.tokenizer import ByteTokenizer, SentencePieceTokenizer, SpecialTokens, train_sentencepiece

BYTE = ByteTokenizer()
SIZES = dict(vocab_size=BYTE.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=256)
LLAMA3 = RopeScaling(type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                     original_max_position_embeddings=32)
HASHES = "mlx_pretrain.sha256.json"
IDS = mx.array([[5, 6, 200, 257, 9, 9, 12, 77], [1, 2, 3, 4, 5, 6, 7, 8]])


def lively(**sizes):
    model = Llama(LlamaArgs(**{**SIZES, **sizes}), seed=1)
    return model.update(tree_map(lambda w: 5 * w if w.ndim > 1 else w + 0.1, model.parameters()))


@pytest.fixture
def model(): return lively()


@pytest.fixture
def saved(model, tmp_path):
    export(model, BYTE, tmp_path / "m")
    return tmp_path / "m"


def edit(directory, **changes):
    "Change config.json; a value of ... deletes the key."
    config = json.loads((directory / "config.json").read_text())
    config = {k: v for k, v in {**config, **changes}.items() if v is not ...}
    (directory / "config.json").write_text(json.dumps(config))


def reweigh(directory, change, name="model.safetensors"):
    (directory / HASHES).unlink(missing_ok=True)
    weights = dict(mx.load(str(directory / name)))
    mx.eval(weights)
    change(weights)
    mx.save_safetensors(str(directory / name), weights)


def refused(path, *words, error=PretrainedError):
    with pytest.raises(error) as caught: load(path)
    text = str(caught.value)
    assert isinstance(caught.value, UserError) and "\n" not in text, text
    for word in words: assert word in text, text


# ---- round trip

@pytest.mark.parametrize("sizes", [
    {}, {"tie_word_embeddings": False}, {"rope_scaling": LLAMA3},
    {"rope_scaling": RopeScaling(type="linear", factor=2.5)},
    {"attention_bias": True, "mlp_bias": True}, {"head_dim": 16, "rope_theta": 5e5, "rms_norm_eps": 1e-6},
    {"num_key_value_heads": 4},
    {"vocab_size": 300},
])
def test_export_and_load_give_the_same_bits(sizes, tmp_path):
    model = lively(**sizes)
    export(model, BYTE, tmp_path / "a" / "b")
    back = load(tmp_path / "a" / "b")
    assert back.model.args == model.args and back.path == tmp_path / "a" / "b"
    assert mx.array_equal(back.model(IDS), model(IDS))
    assert type(back.tokenizer) is ByteTokenizer and back.tokenizer.encode("né") == BYTE.encode("né")
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b"]


def test_sentencepiece_model(tmp_path):
    tokenizer = train_sentencepiece(["the llama eats the grass"] * 20, 290, tmp_path / "t")
    model = lively(vocab_size=tokenizer.vocab_size)
    export(model, tokenizer, tmp_path / "m")
    back = load(str(tmp_path / "m"))
    assert isinstance(back.tokenizer, SentencePieceTokenizer) and back.tokenizer.encode(
        "the llama\n"
    ) == tokenizer.encode("the llama\n")
    config, generation = (json.loads((tmp_path / "m" / name).read_text())
                          for name in ("config.json", "generation_config.json"))
    for content in (config, generation):
        assert [content[f"{n}_token_id"] for n in ("pad", "bos", "eos")] == [0, 2, 3]


def test_exported_files(saved):
    config = json.loads((saved / "config.json").read_text())
    wanted = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu",
              "rope_theta": 1e4, "rope_scaling": None,
              "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "tie_word_embeddings": True,
              "head_dim": 8, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "bos_token_id": 257,
              "eos_token_id": 258, "pad_token_id": 256, "dtype": "float32", "torch_dtype": "float32",
              "attention_bias": False, "mlp_bias": False, "max_position_embeddings": 256}
    assert {k: config.get(k) for k in wanted} == wanted
    weights, metadata = mx.load(str(saved / "model.safetensors"), return_metadata=True)
    assert metadata == {"format": "pt"} and "lm_head.weight" not in weights
    assert {w.dtype for w in weights.values()} == {mx.float32}


@settings(deadline=None, max_examples=60)
@given(theta=st.floats(1, 1e7), factor=st.floats(1, 64), kind=st.sampled_from(["none", "linear", "llama3"]),
       tied=st.booleans(),
       heads=st.sampled_from([(4, 1), (4, 2), (4, 4), (6, 3)]), half=st.integers(1, 40),
       eps=st.floats(1e-9, 1e-2))
def test_args_round_trip_through_config_json(theta, factor, kind, tied, heads, half, eps):
    scaling = RopeScaling() if kind == "none" else RopeScaling(type=kind, factor=factor)
    args = LlamaArgs(**{**SIZES, "rope_theta": theta, "rope_scaling": scaling, "tie_word_embeddings": tied,
                        "head_dim": 2 * half, "num_attention_heads": heads[0],
                        "num_key_value_heads": heads[1], "rms_norm_eps": eps})
    config = json.loads(json.dumps(args_to_hf(args, BYTE)))
    assert args_from_hf(config) == args
    assert args_from_hf({k: v for k, v in config.items() if k != "rope_parameters"}) == args
    assert args_from_hf({k: v for k, v in config.items() if k not in ("rope_theta", "rope_scaling")}) == args


def test_interleaved_rope_is_exported_half_split(tmp_path):
    model = lively(rope_traditional=True, attention_bias=True)
    export(model, BYTE, tmp_path / "m")
    back = load(tmp_path / "m").model
    assert not back.args.rope_traditional
    scale = mx.abs(model(IDS)).max().item()
    assert mx.abs(back(IDS) - model(IDS)).max().item() < 2e-5 * scale
    edit(tmp_path / "m", rope_traditional=True)  # what mlx-lm calls it: then the rows stay as they are
    assert load(tmp_path / "m").model.args.rope_traditional
    assert mx.abs(load(tmp_path / "m").model(IDS) - model(IDS)).max().item() > 0.01 * scale


def test_bfloat16_masters_become_float32(model, tmp_path):
    model.set_dtype(mx.bfloat16)
    export(model, BYTE, tmp_path / "m")
    assert {w.dtype for w in mx.load(str(tmp_path / "m/model.safetensors")).values()} == {mx.float32}
    assert {w.dtype for _, w in tree_flatten(load(tmp_path / "m").model.parameters())} == {mx.float32}


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_half_precision_is_read_exactly(saved, model, dtype):
    reweigh(saved, lambda w: w.update({k: v.astype(dtype) for k, v in w.items()}))
    for name, w in tree_flatten(load(saved).model.parameters()):
        assert w.dtype == mx.float32 and mx.array_equal(
            w, dict(tree_flatten(model.parameters()))[name].astype(dtype).astype(mx.float32)
        )


# ---- shards

def shard(directory, n=3):
    (directory / HASHES).unlink()
    weights = dict(mx.load(str(directory / "model.safetensors")))
    mx.eval(weights)
    (directory / "model.safetensors").unlink()
    weight_map = {}
    for i in range(n):
        file = f"model-{i + 1:05}-of-{n:05}.safetensors"
        part = {k: weights[k] for k in list(weights)[i::n]}
        mx.save_safetensors(str(directory / file), part)
        weight_map |= dict.fromkeys(part, file)
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def test_shards(saved, model):
    index = shard(saved)
    assert mx.array_equal(load(saved).model(IDS), model(IDS))
    index.unlink()
    assert mx.array_equal(load(saved).model(IDS), model(IDS))  # also without an index, if all is there
    (saved / "model-00002-of-00003.safetensors").unlink()
    refused(saved, "has no weights model.", "and ")


def test_index_decides(saved, model):
    shard(saved)
    mx.save_safetensors(str(saved / "consolidated.safetensors"), {"tok_embeddings.weight": mx.zeros(3)})
    assert mx.array_equal(load(saved).model(IDS), model(IDS))


def test_missing_shard(saved):
    shard(saved)
    (saved / "model-00002-of-00003.safetensors").unlink()
    refused(saved, "model-00002-of-00003.safetensors is missing", "download it again")


@pytest.mark.parametrize("content",
                         ["{}", '{"weight_map": {"a": "../m/model.safetensors"}}',
                          '{"weight_map": {"a": "/etc/passwd"}}',
                                     '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "model.bin"}}'])
def test_bad_index(saved, content):
    (saved / "model.safetensors.index.json").write_text(content)
    refused(saved, "index.json", "download it again")


def test_index_that_is_not_json(saved):
    (saved / "model.safetensors.index.json").write_text("version https://git-lfs…")
    refused(saved, "index.json is not valid JSON", error=UserError)


def test_duplicate_weight(saved):
    shutil.copy(saved / "model.safetensors", saved / "model2.safetensors")
    refused(saved, "model2.safetensors holds", "another file holds too")


# ---- weights

NORM = "model.norm.weight"


@pytest.mark.parametrize("change,words", [
    (lambda w: w.pop(NORM), ["model.safetensors has no weights model.norm.weight"]),
    (lambda w: w.update({"model.norm.bias": mx.zeros(32)}), ["has unexpected weights model.norm.bias"]),
    (lambda w: w.update({NORM: mx.ones((32, 1))}), ["model.norm.weight is (32, 1)", "(32,)"]),
    (lambda w: w.update({NORM: mx.full(32, float("nan"))}), ["model.norm.weight holds NaN"]),
    (lambda w: w.update({NORM: mx.full(32, float("inf")).astype(mx.float16)}),
     ["model.norm.weight holds NaN or infinity"]),
    (lambda w: w.update({NORM: mx.ones(32, dtype=mx.int32)}), ["model.norm.weight holds", "int32"]),
    (lambda w: w.clear() or w.update({"x": mx.zeros(1)}), ["has no weights", "and 17 more"]),
    (lambda w: w.update({"model.layers.0.mlp.up_proj.scales": mx.zeros(1)}),
     ["is quantized", "up_proj.scales", "--dequantize"]),
])
def test_wrong_weights_are_reported(saved, change, words):
    reweigh(saved, change)
    refused(saved, *words)


def test_output_matrix_of_a_tied_model(saved, model):
    reweigh(saved, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"]}))
    assert mx.array_equal(load(saved).model(IDS), model(IDS))
    edit(saved, tie_word_embeddings=False)
    opened = load(saved).model
    assert not opened.args.tie_word_embeddings and mx.array_equal(opened(IDS), model(IDS))
    edit(saved, tie_word_embeddings=True)
    reweigh(saved, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"] + 1}))
    refused(saved, "has unexpected weights lm_head.weight", "tie_word_embeddings")


def test_untied_without_output_matrix(saved):
    edit(saved, tie_word_embeddings=False)
    refused(saved, "has no weights lm_head.weight", "tie_word_embeddings")
    edit(saved, tie_word_embeddings=...)                                  # transformers' default is no
    refused(saved, "has no weights lm_head.weight", "tie_word_embeddings")


def test_old_rotary_tables_are_ignored(saved, model):
    reweigh(saved, lambda w: w.update({"model.layers.1.self_attn.rotary_emb.inv_freq": mx.ones(4)}))
    assert mx.array_equal(load(saved).model(IDS), model(IDS))


def test_more_layers_than_in_the_config(saved):
    edit(saved, num_hidden_layers=1)
    refused(saved, "has unexpected weights model.layers.1.", "config.json")


@pytest.mark.parametrize("cut",
                         [lambda b: b[:-1], lambda b: b[:100], lambda b: b"",
                          lambda b: b"version https://git-lfs.github.com/spec/v1\n",
                                 lambda b: b"\xff" * 8 + b[8:]])
def test_truncated_weights(saved, cut):
    file = saved / "model.safetensors"
    file.write_bytes(cut(file.read_bytes()))
    refused(saved, "model.safetensors is damaged or incomplete")


# ---- manifest

def flip(file, bit):
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def load_warnings(path, caplog):
    "The warnings of `load`; None if it is refused."
    caplog.clear()
    try: load(path)
    except UserError as e: return check_sentence(str(e).replace("; does its", "; check that its"))
    return " ".join(record.getMessage() for record in caplog.records)


@pytest.fixture(scope="module")
def with_vocabulary(tmp_path_factory):
    "An export with a binary file that is not weights, and a text file that is not JSON."
    home = tmp_path_factory.mktemp("vocabulary")
    tok = train_sentencepiece(["a few words for a small vocabulary"] * 3, 290, home / "tok")
    export(lively(vocab_size=tok.vocab_size), tok, home / "m",
           PromptFormat(prompt_format="Q: {instruction}\nA:"))
    return home / "m"


def test_every_flipped_bit_is_reported(with_vocabulary, tmp_path, caplog):
    rng, kept = random.Random(0), shutil.copytree(with_vocabulary, tmp_path / "m")
    names = sorted(path.name for path in kept.iterdir())
    header = 64 + 8 * int.from_bytes((kept / "model.safetensors").read_bytes()[:8], "little")  # its bits
    assert {"tokenizer.model", "chat_template.jinja", "model.safetensors", HASHES} < {*names}
    assert load_warnings(kept, caplog) == ""
    for name in names:
        for _ in range(12):
            bit = rng.randrange(8 * (kept / name).stat().st_size)
            flip(kept / name, bit)
            warnings = load_warnings(kept, caplog)
            named = "" if name == HASHES else name  # a hash that differs looks like a file that does
            # there, as if saved anew
            text = name.endswith((".json", ".jinja")) or name == "model.safetensors" and bit < header
            assert warnings is None or text and f"{named} changed since the export" in warnings, (name,
            warnings)
            shutil.copy(with_vocabulary / name, kept / name)
    assert load_warnings(kept, caplog) == ""


def test_missing_or_truncated_file_is_reported(with_vocabulary, tmp_path, caplog):
    for path in with_vocabulary.iterdir():
        for cut in (0, 1, path.stat().st_size // 2, path.stat().st_size - 1, None):
            kept = shutil.copytree(with_vocabulary, tmp_path / "m")
            if cut is None: (kept / path.name).unlink()
            else: os.truncate(kept / path.name, cut)
            if cut is None and path.name == HASHES: assert load_warnings(kept, caplog) == ""
            elif path.suffix == ".jinja" and cut: assert path.name in load_warnings(kept, caplog)
            elif path.suffix == ".json" and cut == path.stat().st_size - 1 and path.name != HASHES:
                # its last line break, perhaps
                assert path.name in (load_warnings(kept, caplog) or path.name)
            else: refused(kept, path.name, error=UserError)
            shutil.rmtree(kept)


def test_the_remedies_work(saved, model, caplog):
    original = (saved / "model.safetensors").read_bytes()
    flip(saved / "model.safetensors", 8 * len(original) - 100)
    refused(saved, "model.safetensors is damaged or incomplete", f"delete {saved / HASHES}")
    (saved / "model.safetensors").write_bytes(original)
    edit(saved, max_position_embeddings=64)
    assert load(saved).model.args.max_position_embeddings == 64 and [
        r.getMessage() for r in caplog.records
    ] == [f"{saved}: config.json changed since the export; if that was on purpose, delete {saved / HASHES}."]
    caplog.clear()
    (saved / HASHES).unlink()
    assert load(saved).model.args.max_position_embeddings == 64 and not caplog.records
    export(model, BYTE, saved)
    assert (
        load(saved).model.args.max_position_embeddings == 256
        and not caplog.records
        and (saved / HASHES).exists()
    )


# ---- config.json

@pytest.mark.parametrize("changes,words", [
    ({"model_type": "mistral"}, ["model_type is 'mistral'"]),
    ({"model_type": ...}, ["model_type is None"]),
    ({"hidden_act": "gelu"}, ["hidden_act is 'gelu'"]),
    ({"quantization": {"group_size": 64, "bits": 4}},
     ["quantized", "config.json", "mlx_lm.convert --hf-path", "--dequantize"]),
    ({"quantization_config": {"quant_method": "gptq"}}, ["quantized", "--dequantize", "original"]),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "rope_parameters": ...}, ["'yarn'"]),
    ({"rope_scaling": {"type": "dynamic", "factor": 4.0}, "rope_parameters": ...}, ["'dynamic'"]),
    ({"rope_parameters": {"rope_type": "longrope", "factor": 4.0}}, ["'longrope'"]),
    ({"rope_scaling": {"type": "linear", "factor": 4.0}}, ["contradict"]),
    ({"rope_theta": 5e5}, ["contradict"]),
    ({"rope_scaling": {"type": "linear"}, "rope_parameters": ...}, ["lacks factor"]),
    ({"partial_rotary_factor": 0.25}, ["partial_rotary_factor"]),
    ({"hidden_size": "32"}, ["hidden_size", "integer"]),
    ({"hidden_size": ..., "vocab_size": ...}, ["vocab_size, hidden_size missing"]),
    ({"num_key_value_heads": 3}, ["multiple"]),
    ({"head_dim": 7}, ["head_dim"]),
    ({"vocab_size": 200}, ["tokenizer has 259 tokens", "only 200"]),
    ({"num_hidden_layers": -1}, ["num_hidden_layers"]),
])
def test_configs_that_cannot_be_used(saved, changes, words):
    edit(saved, **changes)
    refused(saved, str(saved), *words)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000])
def test_config_that_is_not_an_object(saved, text):
    (saved / "config.json").write_text(text)
    refused(saved, "config.json", error=UserError)


def test_defaults_are_those_of_transformers():
    args = args_from_hf({"model_type": "llama", "vocab_size": 10, "hidden_size": 32, "intermediate_size": 48,
                         "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": None,
                         "rope_theta": None})
    assert args == LlamaArgs(vocab_size=10, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                             num_attention_heads=4, num_key_value_heads=4, head_dim=8,
                             max_position_embeddings=2048, rms_norm_eps=1e-6, rope_theta=1e4,
                             tie_word_embeddings=False)


# ---- paths

def test_paths_without_a_model(tmp_path, monkeypatch, saved):
    monkeypatch.chdir(tmp_path)
    refused("HuggingFaceTB/SmolLM2-135M", "`hf download HuggingFaceTB/SmolLM2-135M --local-dir SmolLM2-135M`")
    (tmp_path / "runs").mkdir()
    refused("runs/Llama-2M-SFT", "runs/Llama-2M-SFT does not exist")
    refused(tmp_path / "none" / "of" / "these", "does not exist")
    refused(saved / "model.safetensors", "is a file")
    refused(tmp_path / "runs", "holds no model")
    os.remove(saved / "model.safetensors")
    refused(saved, "model.safetensors is missing, but mlx_pretrain.sha256.json lists it; copy it again")
    os.remove(saved / HASHES)
    refused(saved, "no *.safetensors")
    (saved / "pytorch_model.bin").write_bytes(b"x")
    refused(saved, "pytorch_model.bin", "save_pretrained")


def test_weights_saved_by_another_program_are_a_warning(saved, caplog):
    before = load(saved).model(IDS)
    weights = dict(mx.load(str(saved / "model.safetensors")))
    mx.eval(weights)
    mx.save_safetensors(str(saved / "model.safetensors"), {k: 2 * w for k, w in weights.items()},
                        metadata={"format": "pt", "by": "other"})
    assert not mx.allclose(load(saved).model(IDS),
                           before) and caplog.text.count("model.safetensors changed since the export") == 1
    with open(saved / "model.safetensors", "ab") as file:  # and then it is torn
        file.write(b"x")
    refused(saved, "model.safetensors is damaged or incomplete")


def test_no_tokenizer(saved):
    for name in ("tokenizer.json", "tokenizer_config.json"): (saved / name).unlink()
    refused(saved, "tokenizer", error=UserError)


def start(tmp_path, model):
    run = Run("Llama (2M)", "name: Llama (2M)\n", root=tmp_path / "runs")
    BYTE.save(run.path / "tokenizer")
    arrays = {"model": dict(tree_flatten(model.parameters())), "optimizer": {"step": mx.array(3)}}
    return run, run.save_checkpoint(500, arrays, {"args": model.args.model_dump(), "tokens": 7})


def test_run_and_checkpoint(tmp_path, model, monkeypatch):
    run, checkpoint = start(tmp_path, model)
    refused(run.path, "no finished model yet", str(checkpoint))
    assert mx.array_equal(load(checkpoint).model(IDS), model(IDS))
    monkeypatch.chdir(checkpoint)
    assert load(".").tokenizer.eos_id == BYTE.eos_id
    export(lively(num_hidden_layers=1), BYTE, run.path / "model")
    # a resumed run: its model is that of an earlier end
    refused(run.path, "no finished model yet", str(checkpoint))
    run.finish("finished")
    assert load(run.path).model.args.num_hidden_layers == 1 and load(run.path).path == run.path / "model"
    assert load(checkpoint).model.args.num_hidden_layers == 2


def test_checkpoint_with_traditional_rope_and_scaling(tmp_path):
    model = lively(rope_traditional=True, rope_scaling=LLAMA3, tie_word_embeddings=False)
    back = load(start(tmp_path, model)[1]).model
    assert back.args == model.args and mx.array_equal(back(IDS), model(IDS))


def test_damaged_checkpoint(tmp_path, model):
    _, checkpoint = start(tmp_path, model)
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    refused(checkpoint, "model.safetensors is damaged", error=RunError)
    (checkpoint / "manifest.json").unlink()
    refused(checkpoint, "manifest.json is missing", error=RunError)


def test_replaced_tokenizer_of_a_checkpoint(tmp_path, model):
    run, _ = start(tmp_path, model)
    state = {"args": model.args.model_dump(), "tokenizer": BYTE.fingerprint}
    checkpoint = run.save_checkpoint(501, {"model": dict(tree_flatten(model.parameters()))}, state)
    assert mx.array_equal(load(checkpoint).model(IDS), model(IDS))
    ByteTokenizer(special_tokens=SpecialTokens(eos="<end>")).save(run.path / "tokenizer")
    refused(checkpoint, f"{run.path / 'tokenizer'} is damaged or replaced", "copy the whole run again",
            error=UserError)


def test_checkpoint_without_args(tmp_path, model):
    run, _ = start(tmp_path, model)
    for state in ({}, {"args": None}, {"args": {"vocab_size": 3}}):
        refused(run.save_checkpoint(501, {"model": {}}, state), "state.json does not hold the model's sizes")
    refused(run.save_checkpoint(501, {}, {"args": model.args.model_dump()}),
            "has no weights model.embed_tokens.weight")
    shutil.rmtree(run.path / "tokenizer")
    refused(run.save_checkpoint(501, {}, {"args": model.args.model_dump()}), "tokenizer", error=UserError)


# ---- writing

def test_replaces_exports_only(saved, model, tmp_path):
    export(lively(num_hidden_layers=1), BYTE, saved)
    assert load(saved).model.args.num_hidden_layers == 1
    (tmp_path / "empty").mkdir()
    export(model, BYTE, tmp_path / "empty")
    (saved / "README.md").write_text("mine")
    with pytest.raises(PretrainedError, match="holds README.md"): export(model, BYTE, saved)
    with pytest.raises(PretrainedError, match="is a file"): export(model, BYTE, saved / "README.md")
    with pytest.raises(PretrainedError, match="do not belong together"):
        export(lively(vocab_size=258), BYTE, tmp_path / "x")
    assert load(saved).model.args.num_hidden_layers == 1 and not (tmp_path / "x").exists()


def test_failed_export_keeps_the_old_one(saved, model, tmp_path, monkeypatch):
    def full(*args, **more): raise OSError(28, "No space left on device")
    monkeypatch.setattr(BYTE, "save", full)
    with pytest.raises(RunError, match="No space left on device"):
        export(lively(num_hidden_layers=1), BYTE, saved)
    monkeypatch.undo()
    assert mx.array_equal(load(saved).model(IDS),
                          model(IDS)) and [p.name for p in tmp_path.iterdir()] == ["m"]


def test_unwritable_path(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as caught: export(model, BYTE, tmp_path / "file" / "m")
    assert "\n" not in str(caught.value)


def test_symlink_stays(saved, tmp_path):
    link = tmp_path / "latest"
    link.symlink_to(saved)
    export(lively(num_hidden_layers=1), BYTE, link)
    assert link.is_symlink() and load(saved).model.args.num_hidden_layers == 1


def test_loaded_weights_are_in_memory(saved, model):
    back = load(saved).model
    shutil.rmtree(saved)
    np.testing.assert_array_equal(np.array(back(IDS)), np.array(model(IDS)))
    assert not Path(saved).exists()


@pytest.mark.linux
def test_path_that_is_not_utf8_is_refused_immediately(saved, model, tmp_path, monkeypatch):
    "MLX opens no such file: a run would fail after its last step, at the export."
    odd = tmp_path / os.fsdecode(b"b\xff")
    shutil.copytree(saved, odd)
    refused(odd, r"b\udcff is not UTF-8 text: rename that folder or file")
    with pytest.raises(PretrainedError, match="is not UTF-8 text"): export(model, BYTE, odd / "m")
    monkeypatch.chdir(odd)
    for start in (lambda: Run("r", ""), lambda: find_checkpoint(ResumeConfig(), "runs/r")):
        with pytest.raises(RunError, match="is not UTF-8 text: rename"): start()
    assert not (odd / "runs").exists()
