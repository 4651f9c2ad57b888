"LoRA: only adapters are trained; planted bugs must be detected."
import itertools
import json
import shutil
from pathlib import Path

import pytest

import mlx_pretrain  # noqa: F401, I001 (before MLX)

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_pretrain import (
    lora as lora_module, model as model_module, ops, stage as stage_module, step as step_module,
    trainer as trainer_module)
from mlx_pretrain.checkpoint import load_checkpoint
from mlx_pretrain.cli import main
from mlx_pretrain.config import UserError
from mlx_pretrain.core import key_for
from mlx_pretrain.lora import (
    AdapterError, Dropout, LoRAConfig, LoRALinear, adapters, apply_lora, dropping, load_adapters, lora_layers,
    merge, save_adapters)
from mlx_pretrain.model import Llama, LlamaArgs
from mlx_pretrain.pretrain import PretrainConfig, pretrain
from mlx_pretrain.pretrained import Pretrained, PretrainedError, load
from mlx_pretrain.run import RunError, checkpoints, read_metrics
from mlx_pretrain.sft import SFTConfig, SFTTrainer, sft
from mlx_pretrain.tokenizer import ByteTokenizer

ROWS = [{"instruction": f"Count {i}", "response": "one " * i} for i in range(1, 11)]
PLANTED = pytest.mark.parametrize("planted", [False, True])
ARGS = LlamaArgs(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                 num_attention_heads=4, num_key_value_heads=2, head_dim=8)
KINDS = {"plain": {}, "biases": {"attention_bias": True, "mlp_bias": True},
         "interleaved": {"rope_traditional": True}, "untied": {"tie_word_embeddings": False}}
KIND = pytest.mark.parametrize("kind", KINDS)
IDS = mx.random.randint(0, 64, (2, 12), key=mx.random.key(1))


def merged(a, b):
    return {**a, **{k: merged(a[k], v) if isinstance(v, dict) and isinstance(a.get(k), dict) else v
                    for k, v in b.items()}}
def weights(model): return dict(tree_flatten(model.parameters()))
def equal(a, b): return a.keys() == b.keys() and all(mx.array_equal(a[name], b[name]) for name in a)
def near(a, b): return mx.abs(a - b).max().item() < 1e-5 * mx.abs(b).max().item()
def flat(tree): return mx.concatenate([w.reshape(-1) for _, w in sorted(tree_flatten(tree))])


def lively(kind="plain", **sizes):
    "A model in which all weights, gains and biases have an effect."
    model = Llama(LlamaArgs(**{**ARGS.model_dump(), **KINDS[kind], **sizes}), seed=1)
    return model.update(tree_map(lambda w: 4 * w if w.ndim > 1 else w + 0.1, model.parameters()))


def with_random_adapters(model, **cfg):
    "A model with adapters that are not zero."
    model = apply_lora(model, LoRAConfig(**{"rank": 4, **cfg}))
    return model.update(tree_unflatten([(name, w + 0.05 * mx.random.normal(w.shape, key=key_for(0, 0, name)))
                                        for name, w in adapters(model).items()]))


def line(**sections):
    "A configuration, as YAML may have it."
    data = {"input_file": "rows.jsonl", "validation_file": "val.jsonl",
            "preprocessing": {"max_context_size": 128}}
    return merged({"name": "run", "data": data,
                   "training": {"lora": {"rank": 2},
                                "hyperparameters": {"batch_size": 4, "learning_rate": 1e-2}},
                   "logging": {"steps": {"validation_interval": 4, "checkpoint_interval": 2}}}, sections)


def config(**sections): return SFTConfig.model_validate_json(json.dumps(line(**sections)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "Two pretrained runs of one step; the second has interleaved RoPE."
    home = tmp_path_factory.mktemp("base")
    (home / "text.jsonl").write_text(json.dumps({"text": "bottles of beer on the wall " * 20}) + "\n")
    for name in ("base", "turned"):
        pretrain(
            PretrainConfig.model_validate_json(
                json.dumps(
                    {
                        "name": name,
                        "data": {
                            "input_file": str(home / "text.jsonl"),
                            "preprocessing": {"max_context_size": 16},
                        },
                        "model": {
                            "dimensions": {"hidden_size": 16, "intermediate_size": 32, "num_layers": 2},
                            "attention": {"num_heads": 2, "max_position_embeddings": 128},
                            "rope": {"traditional": name == "turned"},
                        },
                        "training": {"hyperparameters": {"batch_size": 2, "iters": 1, "learning_rate": 0.1}},
                    }
                )
            ),
            home / "runs",
        )
    return home / "runs"


@pytest.fixture
def place(trained, tmp_path, monkeypatch):
    "A directory with rows and both runs in it."
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, "runs")
    for name, rows in (("rows", ROWS), ("val", ROWS[:3])):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def trainer(**sections): return SFTTrainer(config(**{"pretrained_model": "base", **sections}))


# The layer


@KIND
@PLANTED
def test_step_zero_equals_the_base_model(kind, planted):
    base = lively(kind)
    model = apply_lora(base, LoRAConfig(rank=4, dropout=0.5))
    if planted: model.model.layers[0].mlp.up_proj.lora_b += 1e-5          # not zero
    assert mx.array_equal(model(IDS), base(IDS)) != planted and not lora_layers(base)
    with dropping(model, mx.random.key(0)):  # only the adapters' input is dropped
        assert mx.array_equal(model(IDS), base(IDS)) != planted


@KIND
@PLANTED
def test_merged_model_equals_adapters(kind, planted, monkeypatch):
    model = with_random_adapters(lively(kind), alpha=12)
    if planted:  # no scale
        monkeypatch.setattr(LoRALinear, "merged",
                            property(lambda self: self.weight + (self.lora_a @ self.lora_b).T))
    assert near(merge(model)(IDS), model(IDS)) != planted
    assert not lora_layers(merge(model)) and not near(model(IDS), lively(kind)(IDS))


@pytest.mark.parametrize("cfg, scale",
                         [({"rank": 3}, 2), ({"rank": 3, "alpha": 3}, 1), ({"rank": 6, "alpha": 3}, 0.5)])
def test_rank_and_alpha_by_hand(cfg, scale):
    model = with_random_adapters(lively("biases"), **cfg)
    layer, x = model.model.layers[1].self_attn.k_proj, np.linspace(-1, 1, 32, dtype=np.float32)[None]
    w, b, la, lb = (np.array(layer[name]) for name in ("weight", "bias", "lora_a", "lora_b"))
    assert la.shape == (32, cfg["rank"]) and lb.shape == (cfg["rank"], 16)
    want = x @ w.T + b + scale * (x @ la @ lb)
    assert np.allclose(np.array(model_module.project(mx.array(x), layer)[0]), want, atol=1e-5)


SEVEN = ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", *(f"self_attn.{x}_proj" for x in "koqv")]


@pytest.mark.parametrize("cfg, blocks, names", [
    ({}, [0, 1, 2], SEVEN), ({"num_layers": 1}, [2], SEVEN),
    ({"targets": ["v_proj", "q_proj"]}, [0, 1, 2], ["self_attn.q_proj", "self_attn.v_proj"]),
    ({"targets": "mlp.up_proj", "num_layers": 2}, [1, 2], ["mlp.up_proj"]),
])
def test_targets_and_num_layers(cfg, blocks, names):
    model = apply_lora(lively(), LoRAConfig(rank=2, **cfg))
    want = [f"model.layers.{i}.{name}" for i in blocks for name in names]
    assert [*lora_layers(model)] == want
    assert sorted(dict(tree_flatten(model.trainable_parameters()))) == sorted(
        f"{name}.lora_{x}" for name in want for x in "ab"
    )


# What is trained


def norm_left_trainable(monkeypatch):
    def apply(*args):
        model = apply_lora(*args)
        model.model.norm.unfreeze()
        return model
    monkeypatch.setattr(stage_module, "apply_lora", apply)


def only_attention(monkeypatch):
    few = {"targets": ("q_proj", "k_proj", "v_proj", "o_proj")}
    monkeypatch.setattr(stage_module, "apply_lora",
                        lambda model, cfg, seed: apply_lora(model, cfg.model_copy(update=few), seed))


def trains_only_the_adapters(**sections):
    t = trainer(**sections)
    names = {f"model.layers.{i}.{name}.lora_{x}" for i in range(2) for name in SEVEN for x in "ab"}
    before, base = weights(t.model), weights(load("base").model)
    t.step()
    loss_and_grad = nn.value_and_grad(t.model, lambda batch: t.loss(t.model, batch)[0])
    grads = dict(tree_flatten(loss_and_grad(t.batches_at(1)[0])[1]))
    for _ in range(2): t.step()
    after = weights(t.model)
    moved = {name for name in after if not mx.array_equal(before[name], after[name])}
    memory = [{name for name in names if name in key} for key in t.arrays()["optimizer"] if "model." in key]
    return (grads.keys() == moved == {*t.arrays()["model"]} == names
            and all(mx.abs(g).max() > 0 for g in grads.values()) and all(memory)
            and {*()}.union(*memory) in (names, set()) and all(w.dtype == mx.float32 for w in after.values())
            and equal({name: w for name, w in after.items() if name not in names}, base))


@pytest.mark.parametrize("sections", [
    {}, {"training": {"optimization": {"optimizer": "muon"}}},
    {"training": {"optimization": {"optimizer": "sgd"}}},
    {"system": {"gradient_checkpointing": True}}, {"system": {"precision": "bfloat16"}},
    {"training": {"hyperparameters": {"gradient_accumulation_steps": 2}, "epochs": 3}}], ids=str)
def test_only_adapters_are_trained(place, sections):
    assert trains_only_the_adapters(**sections)


@pytest.mark.parametrize("bug", [norm_left_trainable, only_attention])
def test_planted_freezing_bugs_are_detected(place, monkeypatch, bug):
    bug(monkeypatch)
    assert not trains_only_the_adapters()


# Dropout


def with_dropout(**sections):
    return trainer(**merged({"training": {"lora": {"dropout": 0.5}, "epochs": 2}}, sections))


def start(): return adapters(with_random_adapters(load("base").model, rank=2))


def gradient(t, *keys):
    "The gradient of the adapters for one batch, with these keys, added up."
    step_module.assign_arrays(t.model, start())
    return flat(tree_map(lambda *g: sum(g), *[t.update.gradient(t.batches_at(0)[0], key)[1] for key in keys]))


def stateful_dropout(monkeypatch):
    "Planted bug: dropout draws new numbers at each call, as with a global random state."
    numbers = itertools.count()

    def draw(self, x):
        if self.key is None: return x
        return mx.where(mx.random.bernoulli(1 - self.rate, x.shape, key=mx.random.key(next(numbers))),
                        x / (1 - self.rate), 0)
    monkeypatch.setattr(Dropout, "__call__", draw)


def test_dropout_depends_only_on_seed_and_step(place):
    t, key = with_dropout(), [key_for(42, step, "dropout") for step in (0, 1)]
    one, again, later = gradient(t, key[0]), gradient(t, key[0]), gradient(t, key[1])
    assert mx.array_equal(one,
                          again) and not mx.array_equal(one,
                                                        later) and not mx.array_equal(one, gradient(t, None))
    runs = [with_dropout(), with_dropout(), with_dropout(training={"lora": {"dropout": 0.0}})]
    for n, run in enumerate(runs):
        for _ in range(3):
            run.step()
            mx.random.seed(n)  # the global random state has no effect
    assert equal(runs[0].arrays()["model"],
                 runs[1].arrays()["model"]) and not equal(runs[0].arrays()["model"],
                                                          runs[2].arrays()["model"])


@PLANTED
def test_no_dropout_in_validation_and_generation(place, monkeypatch, planted):
    dry, wet = (with_dropout(training={"lora": {"dropout": share}}) for share in (0.0, 0.9))
    wet.step()  # a step drops, and leaves no key behind
    for t in (dry, wet): step_module.assign_arrays(t.model, start())
    if planted:
        monkeypatch.setattr(
            Dropout,
            "__call__",
            lambda self, x: x * mx.random.bernoulli(1 - self.rate, x.shape, mx.random.key(0)),
        )
    assert (wet.evaluate() == dry.evaluate()) != planted and (wet.answers() == dry.answers()) != planted


@PLANTED
def test_gradient_checkpointing_uses_the_same_dropout(place, monkeypatch, planted):
    if planted: stateful_dropout(monkeypatch)
    key = mx.random.key(3)
    models = [with_dropout(system={"gradient_checkpointing": on}) for on in (False, True)]
    grads = []
    for t in models:
        step_module.assign_arrays(t.model, start())
        with dropping(t.model, key):
            loss_and_grad = nn.value_and_grad(t.model, lambda batch, t=t: t.loss(t.model, batch)[0])
            _, g = loss_and_grad(t.batches_at(0)[0])
        grads.append(flat(g))
    assert near(*grads) != planted
    assert planted or near(*(gradient(t, key) for t in models))            # compiled


@PLANTED
def test_accumulated_batches_use_different_dropout(place, monkeypatch, planted):
    t = with_dropout(training={"hyperparameters": {"gradient_accumulation_steps": 3, "batch_size": 3}})
    seen = []
    original = t.update.gradient
    t.update.gradient = lambda batch, key=None: seen.append(key.tolist()) or original(batch, key)
    if planted: monkeypatch.setattr(trainer_module.mx.random, "split", lambda key, n: mx.stack([key] * n))
    for _ in range(2): t.step()
    assert (len({*map(tuple, seen)}) == len(seen)) != planted and len(seen) == 4


# Resume


LONG = {"epochs": 4, "lora": {"rank": 2, "dropout": 0.4},
        "hyperparameters": {"gradient_accumulation_steps": 2, "batch_size": 2}}


def stop_at(step):
    def callback(t, metrics):
        if metrics["step"] == step: t.stop_requested = True
    return callback


def counted_keys(monkeypatch):
    "Planted bug: dropout keys count calls in this process, instead of steps."
    numbers = itertools.count()
    monkeypatch.setattr(trainer_module, "key_for", lambda *_: mx.random.key(next(numbers)))


@PLANTED
def test_interrupted_run_equals_uninterrupted_run(place, monkeypatch, planted):
    if planted: counted_keys(monkeypatch)
    whole = sft(config(name="whole", pretrained_model="base", training=LONG))
    how, latest = {"name": "cut", "pretrained_model": "base", "training": LONG}, {"checkpoint": "latest"}
    for cut, resume in ((3, {}), (7, latest)):
        with pytest.raises(KeyboardInterrupt): sft(config(**how, resume=resume), callbacks=[stop_at(cut)])
    again = sft(config(**how, resume=latest))
    written = "model/model.safetensors", "adapters/adapters.safetensors"
    assert all((again / file).read_bytes() == (whole / file).read_bytes() for file in written) != planted
    if planted: return
    (arrays, state), (others, _) = (load_checkpoint(checkpoints(run)[-1]) for run in (whole, again))
    assert all(equal(arrays[name], others[name]) for name in ("model", "optimizer")) and state["step"] == 12
    def lines(path):
        return [{k: v for k, v in row.items() if k != "tokens_per_second"}
                for row in read_metrics(path) if "event" not in row]
    assert lines(again) == lines(whole)


@pytest.fixture
def tuned(place): return sft(config(name="tuned", pretrained_model="base", training={"epochs": 2}))


def test_checkpoint_stores_adapters_and_loads_as_merged_model(tuned):
    saved = checkpoints(tuned)[-1]
    assert (
        load_checkpoint(saved)[0]["model"].keys()
        == adapters(apply_lora(load("base").model, LoRAConfig(rank=2))).keys()
    )
    at_the_end, opened, result = saved.name == "step_000006", load(saved), load(tuned)
    assert at_the_end and equal(weights(opened.model),
                                weights(result.model)) and opened.format == result.format
    assert not equal(weights(opened.model), weights(load("base").model))
    next_one = trainer(name="next", pretrained_model=str(saved))
    assert mx.array_equal(next_one.model(IDS), result.model(IDS))          # and new adapters
    full = SFTTrainer(config(name="full", pretrained_model=str(saved), training={"lora": {"rank": 0}}))
    assert full.base is None and equal(weights(full.model), weights(result.model))


def base_deleted(): shutil.rmtree("runs/base")
def base_emptied(): shutil.rmtree("runs/base"); Path("runs/base/model").mkdir(parents=True)
def base_changed(): shutil.rmtree("runs/base/model"); shutil.copytree("runs/turned/model", "runs/base/model")


@pytest.mark.parametrize("spoil, opened, resumed", [
    (base_deleted, "base/model, which does not exist; restore that model", "base does not exist"),
    (base_emptied, "base/model holds no model", "base holds no model"),
    (base_changed, "contains adapters for another model than that which is now in",
     'contains adapters for another model than "pretrained_model" is now'),
])
def test_checkpoint_needs_its_base_model(tuned, spoil, opened, resumed):
    saved = checkpoints(tuned)[-2]
    spoil()
    with pytest.raises(PretrainedError) as one: load(saved)
    on = config(name="tuned", pretrained_model="base", training={"epochs": 3},
                resume={"checkpoint": "latest"})
    with pytest.raises(UserError) as other: sft(on)
    for error, message in ((one, opened), (other, resumed)):
        assert message in str(error.value) and "\n" not in str(error.value)
    assert load(tuned).format                                             # the merged model does not need it


def test_run_and_base_may_move_together(tuned):
    logits = load(tuned).model(IDS)
    Path("runs").rename("moved")
    assert np.allclose(load(checkpoints(Path("moved") / "tuned")[-1]).model(IDS), logits, atol=1e-5)


@pytest.mark.parametrize("lora", [
    {"rank": 0}, {"rank": 4}, {"alpha": 1}, {"dropout": 0.1}, {"targets": ["q_proj"]}, {"num_layers": 1}],
    ids=str)
def test_resume_with_another_lora_config_is_refused(tuned, lora):
    with pytest.raises(
        RunError, match='"training.lora" was rank 2, and is .*; restore it, or start a new run'
    ):
        sft(config(name="tuned", pretrained_model="base", training={"epochs": 3, "lora": lora},
                   resume={"checkpoint": "latest"}))


def test_resume_cannot_add_adapters(place):
    sft(config(name="full", pretrained_model="base", training={"lora": {"rank": 0}}))
    with pytest.raises(RunError, match='"training.lora" was left out, and is rank 2; restore it'):
        sft(config(name="full", pretrained_model="base", training={"epochs": 2},
                   resume={"checkpoint": "latest"}))


# Export


@pytest.mark.parametrize("source", ["base", "turned", "turned/checkpoints/step_000001", "turned/model"])
@PLANTED
def test_exported_model_equals_exported_adapters(place, monkeypatch, source, planted):
    if planted and "checkpoints" not in source: return                    # only they keep interleaved RoPE
    if planted: monkeypatch.setattr(lora_module, "half_split", lambda rows, head_dim: rows)
    lora = {"targets": ["q_proj", "k_proj", "up_proj"], "num_layers": 1}
    path = sft(config(pretrained_model=f"runs/{source}", training={"epochs": 3, "lora": lora}))
    result, adapted = load(path).model, load_adapters(load(source.partition("/")[0]).model, path / "adapters")
    assert near(adapted(IDS), result(IDS)) != planted and not near(adapted(IDS), load("base").model(IDS))
    assert near(load(checkpoints(path)[-1]).model(IDS), result(IDS))


def test_adapters_are_refused_for_interleaved_rope(place):
    save_adapters(with_random_adapters(lively()), "ad")
    with pytest.raises(AdapterError, match="open this model from its exported directory"):
        load_adapters(lively("interleaved"), "ad")


# Configuration


@pytest.mark.parametrize("way", ["yaml", "command line"])
def test_config_reaches_the_adapters(place, capsys, way):
    lora = {"rank": 3, "alpha": 1.5, "dropout": 0.25, "targets": ["q_proj", "v_proj"], "num_layers": 1}
    cfg, flags = line(pretrained_model="base"), []
    if way == "yaml": cfg["training"]["lora"] = lora
    else:
        flags = "".join(f" --training.lora.{key} {v}"
                        for key, v in lora.items()).translate(str.maketrans("", "", "[],'")).split()
    Path("run.yaml").write_text(json.dumps(cfg))
    assert main(["sft", "--config", "run.yaml", *flags]) == 0
    assert "trainable ones in adapters" in capsys.readouterr().out
    about = json.loads(Path("runs/run/adapters/adapter_config.json").read_text())
    assert about == {"model": str(Path("runs/base/model").resolve()), "fine_tune_type": "lora",
                     "num_layers": 1, "lora_parameters": {"rank": 3, "scale": 0.5, "dropout": 0.25,
                                                          "keys": ["self_attn.q_proj", "self_attn.v_proj"]}}
    assert mx.load("runs/run/adapters/adapters.safetensors")[
        "model.layers.1.self_attn.v_proj.lora_a"
    ].shape == (16, 3)


@pytest.mark.parametrize("flags, sentence", [
    (["rank", "-1"], "training.lora.rank"), (["rank", "1.5"], "training.lora.rank"),
    (["rank", "9999"], "training.lora.rank"),
    (["alpha", "0"], "training.lora.alpha"), (["alpha", ".inf"], "training.lora.alpha"),
    (["dropout", "1"], "training.lora.dropout"),
    (["dropout", "-0.1"], "training.lora.dropout"), (["num_layers", "0"], "training.lora.num_layers"),
    (["targets", "1"], "training.lora.targets"), (["rnk", "4"], 'did you mean "training.lora.rank"?'),
    (["targets", "w_pack"],
     "\"training.lora.targets\": a block has no projection 'w_pack'; it has q_proj, k_proj"),
    (["targets", "q_proj", "lm_head"], "no projection 'lm_head'; it has q_proj"),
    (["num_layers", "3"], '"training.lora.num_layers" is 3, but the model has only 2 layers'),
    (["rank", "0", "--training.lora.alpha", "16"], "rank is 0, so there are no adapters"),
    (["rank", "2", "--training.freeze", "0"], "remove freeze and train_only"),
    (["rank", "2", "--training.train_only", "1"], "remove freeze and train_only"),
    (["rank", "2", "--pretrained_model", "null"], '"training.lora": adapters need a base model'),
])
def test_config_errors(place, capsys, flags, sentence):
    Path("run.yaml").write_text(json.dumps(line(pretrained_model="base")))
    assert main(["sft", "--config", "run.yaml", f"--training.lora.{flags[0]}", *flags[1:]]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1 and not Path("runs/run").exists()


# Broken files


def about(**changes): return lambda cfg, arrays: cfg["lora_parameters"].update(changes)
def weight(change): return lambda cfg, arrays: arrays.update(change(arrays))
def text(content): return lambda cfg, arrays: (cfg.clear(), cfg.update(text=content))


NAME = "model.layers.2.mlp.up_proj.lora_a"
BROKEN = {"no JSON": text("{"), "a list": text("[1]"), "nested": text("[" * 100_000),
          "not UTF-8": text("\udcff"), "no sizes": lambda cfg, arrays: cfg.pop("lora_parameters"),
          "another kind": lambda cfg, arrays: cfg.update(fine_tune_type="dora"),
          "rank as text": about(rank="8"), "another rank": about(rank=3), "rank 0": about(rank=0),
          "scale 0": about(scale=0), "scale NaN": about(scale=np.nan), "dropout 1": about(dropout=1),
          "unknown key": about(keys=["self_attn.w"]), "a key that is no text": about(keys=[1]),
          "nothing in it": lambda cfg, arrays: arrays.clear(),
          "one missing": lambda cfg, arrays: arrays.pop(NAME),
          "one too many": weight(lambda a: {"model.layers.2.mlp.other.lora_a": a[NAME]}),
          "PEFT's": lambda cfg, arrays: cfg.update(peft_type="LORA"),
          "whole numbers": weight(lambda a: {NAME: a[NAME].astype(mx.int32)}),
          "another shape": weight(lambda a: {NAME: a[NAME][:-1]}),
          "NaN": weight(lambda a: {NAME: a[NAME] * mx.nan}),
          "infinity": weight(lambda a: {NAME: a[NAME] / 0}),
          "another name": weight(lambda a: {"x": a.pop(NAME)}),
          "too many layers": weight(lambda a: {n.replace("layers.0", "layers.3"): w for n, w in a.items()}), }


@pytest.mark.parametrize("name", BROKEN)
def test_broken_adapters_are_an_error(tmp_path, name):
    model, folder = lively(), tmp_path / "ad"
    save_adapters(with_random_adapters(model), folder)
    (folder / "mlx_pretrain.sha256.json").unlink()
    cfg = json.loads((folder / "adapter_config.json").read_text())
    arrays = dict(mx.load(str(folder / "adapters.safetensors")))
    mx.eval(arrays)
    BROKEN[name](cfg, arrays)
    (folder / "adapter_config.json").write_text(cfg.get("text") or json.dumps(cfg), errors="surrogateescape")
    mx.save_safetensors(str(folder / "adapters.safetensors"), arrays)
    with pytest.raises(AdapterError) as error: load_adapters(model, folder)
    assert (
        str(error.value).startswith(str(folder))
        and "\n" not in str(error.value)
        and len(str(error.value)) < 400
    )


@pytest.mark.parametrize("file", ["adapter_config.json", "adapters.safetensors"])
def test_corrupted_files_are_detected(tmp_path, file, caplog):
    "Truncated or with flipped bits: an error, or a warning that a text file was changed."
    model, rng = lively(), np.random.default_rng(0)
    save_adapters(with_random_adapters(model), tmp_path)
    whole, refused = (tmp_path / file).read_bytes(), 0
    for n in range(60):
        broken = bytearray(whole[:rng.integers(len(whole))] if n % 2 else whole)
        for _ in range(n % 2 == 0 and 3): broken[rng.integers(min(len(whole), 3000))] = rng.integers(256)
        (tmp_path / file).write_bytes(broken)
        caplog.clear()
        try: load_adapters(model, tmp_path)
        except AdapterError as e: refused += "\n" not in str(e)
        else:
            assert (
                file.endswith(".json")
                and f"{file} changed since the export" in caplog.text
                or broken == whole
            )
    assert refused > (55 if file.endswith(".safetensors") else 40)
    (tmp_path / file).unlink()
    with pytest.raises(AdapterError, match="holds no adapters that can be read"):
        load_adapters(model, tmp_path)


# A head that is frozen


@pytest.mark.parametrize("rows", [1, 64, 150])
def test_frozen_head_gives_the_same_gradient_to_hidden_states(rows, monkeypatch):
    monkeypatch.setattr(ops, "LOGITS", 64 * 50)                           # chunks of 64 rows
    h, w = mx.random.normal((rows, 8), key=mx.random.key(0)), mx.random.normal((50, 8), key=mx.random.key(1))
    targets, mask = mx.random.randint(0, 50, (rows,), key=mx.random.key(2)), mx.arange(rows) % 3 != 1
    (whole, (dh, dw)), (part, (same, none)) = (
        mx.value_and_grad(
            lambda h, w, f=frozen: 3 * ops.head_loss(h, w, targets, mask, True, f)[0], argnums=(0, 1)
        )(h, w)
        for frozen in (False, True)
    )
    assert mx.array_equal(whole, part) and mx.array_equal(dh,
                                                          same) and mx.abs(none).max() == 0 < mx.abs(dw).max()
    naive = mx.grad(lambda h: 3 * (nn.losses.cross_entropy(h @ w.T, targets) * mask).sum())(h)
    assert mx.abs(dh - naive).max() < 1e-4


@KIND
def test_adapters_freeze_the_head(kind, monkeypatch):
    seen, original = [], model_module.head_loss
    monkeypatch.setattr(model_module, "head_loss", lambda *args: seen.append(args[5]) or original(*args))
    for model in (lively(kind), apply_lora(lively(kind), LoRAConfig(rank=2))):
        model.loss(model.hidden(IDS), IDS, IDS >= 0)
    assert seen == [False, True]


@pytest.mark.long
@PLANTED
def test_memory_does_not_grow_with_tokens_times_vocabulary(tmp_path, monkeypatch, planted):
    monkeypatch.chdir(tmp_path)
    def naive(h, w, t, m, *_): return mx.where(m, nn.losses.cross_entropy(h @ w.T, t), 0).sum(), m.sum()
    if planted: monkeypatch.setattr(model_module, "head_loss", naive)
    tok, peaks = ByteTokenizer(49_149), []
    base = Pretrained(lively(vocab_size=tok.vocab_size, hidden_size=16, intermediate_size=16,
                             num_hidden_layers=1), tok, tmp_path)
    for rows in (2, 8):
        Path("rows.jsonl").write_text((json.dumps({"prompt": "?", "completion": "x" * 125}) + "\n") * rows)
        t = SFTTrainer(config(data={"validation_file": None},
                              training={"hyperparameters": {"batch_size": rows}}), base)
        mx.eval(t.model.parameters()); mx.clear_cache(); mx.reset_peak_memory()
        held = mx.get_active_memory()
        t.step()
        peaks.append(mx.get_peak_memory() - held)
    logits = 6 * 126 * tok.vocab_size * 4  # those of the larger step beyond the smaller's, in bytes
    assert (peaks[1] - peaks[0] < logits / 4) != planted
