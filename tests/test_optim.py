"Schedules of all shapes; each optimizer against its paper in double precision; compiled, saved and resumed."
import math
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mlx_pretrain  # noqa: F401, I001 (before MLX)

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten

from mlx_pretrain.config import ConfigError, dump_yaml, load_config
from mlx_pretrain.model import Llama, LlamaArgs, ScalarHead
from mlx_pretrain.optim import (
    SGD, Adam, AdamW, Muon, Optimization, SchedulerConfig, check_optimizer, is_hidden, make_optimizer,
    make_schedule, orthogonalize)

SHAPES, NAMES = ["linear", "cosine", "cosine_with_warmup", "wsd"], ["adam", "adamw", "muon", "sgd"]
ratios = st.floats(0, 1, allow_subnormal=False)


# ---- schedules

@st.composite
def schedules(draw):
    "A configuration that fits its run, the peak learning rate and the number of steps."
    total, shape = draw(st.integers(1, 300)), draw(st.sampled_from(SHAPES))
    cfg = {"type": shape, "min_lr_ratio": draw(ratios)}
    decay = 1
    if shape == "wsd":
        cfg["decay_ratio"] = draw(st.floats(0.01, 1))
        decay = max(1, round(cfg["decay_ratio"] * total))
    if shape != "cosine": cfg["warmup_steps"] = draw(st.integers(0, total - decay))
    return SchedulerConfig(**cfg), draw(st.floats(1e-8, 10)), total


@given(schedules())
def test_schedule_ends_are_exact_and_it_is_monotone(case):
    cfg, peak, total = case
    rate, warmup, last = make_schedule(*case), cfg.warmup_steps or 0, peak * cfg.min_lr_ratio
    rates = [rate(s) for s in range(total)]
    assert rates[max(0, warmup - 1)] == peak == max(rates)                # exactly, and never above
    assert rates[:warmup] == [peak * ((s + 1) / warmup) for s in range(warmup)]
    assert all(a >= b for a, b in zip(rates[warmup:], rates[warmup + 1:]))
    assert total == 1 or rates[-1] == last
    assert rate(total) == rate(total + 10**6) == last


@given(schedules())
def test_schedule_is_a_pure_function_of_the_step(case):
    rate, again = make_schedule(*case), make_schedule(*case)
    steps = np.random.default_rng(0).permutation(case[2]).tolist()
    assert {s: rate(s) for s in steps} == {s: again(s) for s in range(case[2])}


@pytest.mark.parametrize("shape", SHAPES)
def test_short_runs_by_hand(shape):
    run = lambda total: [make_schedule(SchedulerConfig(type=shape, min_lr_ratio=0.25), 8.0, total)(s)
                         for s in range(total)]
    assert run(1) == [8.0]
    assert run(2) == [8.0, 2.0]
    assert run(3) == pytest.approx([8.0, 8.0 if shape == "wsd" else 5.0, 2.0], abs=1e-12)
    assert run(0) == []


def test_wsd_is_constant_then_linear():
    "A fifth of 50 steps decays in ten equal parts, from the last step at the peak."
    rate = make_schedule(SchedulerConfig(type="wsd", warmup_steps=4, min_lr_ratio=0.0), 1.0, 50)
    rates = [rate(s) for s in range(50)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[4:40] == [1.0] * 36
    np.testing.assert_allclose(rates[40:], np.arange(9, -1, -1) / 10, atol=1e-15)


def test_wsd_before_decay_does_not_depend_on_the_length():
    cfg = SchedulerConfig(type="wsd", warmup_steps=10)
    short, long = make_schedule(cfg, 1.0, 100), make_schedule(cfg, 1.0, 1000)
    assert [short(s) for s in range(80)] == [long(s) for s in range(80)]
    cosine = cfg.model_copy(update={"type": "cosine_with_warmup"})
    assert make_schedule(cosine, 1.0, 100)(50) != make_schedule(cosine, 1.0, 1000)(50)


def test_default_warmup_is_a_twentieth():
    "Step 9 of 200 is the first at the peak."
    rate = make_schedule(SchedulerConfig(), 1.0, 200)
    assert (rate(8), rate(9)) == (0.9, 1.0)
    assert make_schedule(SchedulerConfig(warmup_ratio=0.5), 1.0, 200)(49) == 0.5
    assert make_schedule(SchedulerConfig(warmup_ratio=0.0), 1.0, 200)(0) == 1.0


@pytest.mark.parametrize("total, cfg, key", [
    (3, {"warmup_steps": 3}, "warmup_steps"),
    (1, {"warmup_steps": 1}, "warmup_steps"),
    (10, {"warmup_ratio": 1.0}, "warmup_ratio"),
    (10, {"type": "linear", "warmup_steps": 11}, "warmup_steps"),
    (10, {"type": "wsd", "warmup_steps": 9}, "decay_ratio"),
    (100, {"type": "wsd", "decay_ratio": 1.0}, "decay_ratio"),
])
def test_warmup_longer_than_the_run(total, cfg, key):
    with pytest.raises(ConfigError, match=f"training.scheduler.{key}") as caught:
        make_schedule(SchedulerConfig(**cfg), 1.0, total)
    assert "\n" not in str(caught.value) and f"a run of {total}" in str(caught.value)


@pytest.mark.parametrize("total, cfg", [
    (3, {"warmup_steps": 2}), (10, {"type": "wsd", "warmup_steps": 8}),
    (10, {"type": "wsd", "decay_ratio": 1.0, "warmup_steps": 0})])
def test_warmup_that_just_fits(total, cfg):
    rates = [make_schedule(SchedulerConfig(**cfg), 1.0, total)(s) for s in range(total)]
    assert max(rates) == 1.0 and rates[-1] == 0.1


# ---- the sections

@pytest.mark.parametrize("cls, text", [
    (SchedulerConfig, ""),
    (SchedulerConfig, "type: wsd\nwarmup_ratio: 0.1\ndecay_ratio: 0.3\n"),
    (SchedulerConfig, "type: cosine\nwarmup_steps: null\nwarmup_ratio: null\n"),
    (SchedulerConfig, "type: cosine\nwarmup_steps: 0\n"),
    (SchedulerConfig, "type: linear\nwarmup_steps: 7\n"),
    (Optimization, ""),
    (Optimization, "optimizer: muon\n"),
    (Optimization, "optimizer: sgd\nmomentum: 0\n"),
    (Optimization, "optimizer: adam\nbetas: [0.9, 0.999]\neps: 1e-5\nmomentum: null\n"),
])
def test_yaml_round_trip(cls, text, tmp_path):
    (tmp_path / "a.yaml").write_text(text + "{}" * (not text))
    cfg = load_config(cls, tmp_path / "a.yaml")
    dump_yaml(cfg, tmp_path / "b.yaml")
    assert load_config(cls, tmp_path / "b.yaml") == cfg


@pytest.mark.parametrize("cls, text, sentence", [
    (SchedulerConfig, "warmup_steps: 5\nwarmup_ratio: 0.1\n", "keep one of them"),
    (SchedulerConfig, "warmup_steps: 0\nwarmup_ratio: 0\n", "keep one of them"),
    (SchedulerConfig, "type: cosine\nwarmup_ratio: 0.1\n", "use cosine_with_warmup"),
    (SchedulerConfig, "type: wsd\ndecay_ratio: 0\n", "should be greater than 0"),
    (Optimization, "momentum: 0.9\n", "momentum is for muon and sgd; adamw has betas"),
    (Optimization, "optimizer: muon\nmomentum: 1\n", "should be less than 1"),
    (Optimization, "betas: [0.9, 1.0]\n", "betas must lie in"),
    (Optimization, "eps: 0\n", "should be greater than 0"),
])
def test_configuration_errors(cls, text, sentence, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=sentence) as caught: load_config(cls, tmp_path / "a.yaml")
    assert "\n" not in str(caught.value)


# ---- each optimizer against its paper

LR, DECAY, STEPS = 0.01, 0.1, 20


def adam(w, grads, decay, decoupled, b2=0.95, corrected=True):
    w, m, v = w.astype(float), 0.0, 0.0
    for t, g in enumerate(grads.astype(float), 1):
        if not decoupled: g = g + decay * w
        m, v = 0.9 * m + 0.1 * g, b2 * v + (1 - b2) * g**2
        c1, c2 = (1 - 0.9**t, 1 - b2**t) if corrected else (1, 1)
        w = w - LR * (m / c1) / (np.sqrt(v / c2) + 1e-8) - (LR * decay * w if decoupled else 0)
    return w


def sgd(w, grads, decay, kept=0.9):
    w, v = w.astype(float), 0.0
    for g in grads.astype(float):
        v = kept * v + g + decay * w
        w = w - LR * v
    return w


def newton_schulz(x):
    x = x / np.linalg.norm(x)
    for _ in range(5):
        s = x @ x.T
        x = 3.4445 * x - 4.7750 * s @ x + 2.0315 * s @ s @ x
    return x


def muon(w, grads, decay, kept=0.95, mistake=None):
    w, v = w.astype(float), 0.0
    for g in grads.astype(float):
        if mistake == "decay first": g = g + decay * w
        v = kept * v + g
        x = {"no look ahead": v, "exchanged": v + kept * g}.get(mistake, g + kept * v)
        length = (
            max(1, w.shape[0] / w.shape[1]) ** 0.5
            if mistake == "Jordan's length"
            else 0.2 * max(w.shape) ** 0.5
        )
        w = w - LR * (length * newton_schulz(x) + (0 if mistake == "decay first" else decay) * w)
    return w


PAPERS = {"adamw": (lambda: AdamW(LR, weight_decay=DECAY), partial(adam, decoupled=True)),
          "adamw, long memory": (lambda: AdamW(LR, (0.9, 0.999), weight_decay=DECAY),
                                 partial(adam, decoupled=True, b2=0.999)),
          "adam": (lambda: Adam(LR, weight_decay=DECAY), partial(adam, decoupled=False)),
          "sgd": (lambda: SGD(LR, weight_decay=DECAY), sgd),
          "sgd, no momentum": (lambda: SGD(LR, 0.0, DECAY), partial(sgd, kept=0.0)),
          "muon": (lambda: Muon(LR, weight_decay=DECAY), muon),
          "muon, less momentum": (lambda: Muon(LR, 0.8, DECAY), partial(muon, kept=0.8)), }
WRONG = {  # name: (the right paper, a known mistake, decay of the mistake)
    "no bias correction": ("adamw", partial(adam, decoupled=True, corrected=False), DECAY),
    "penalty for decay": ("adamw", partial(adam, decoupled=False), DECAY),
    "decay for penalty": ("adam", partial(adam, decoupled=True), DECAY),
    "adamw without decay": ("adamw", partial(adam, decoupled=True), 0),
    "sgd without penalty": ("sgd", sgd, 0),
    "muon without decay": ("muon", muon, 0),
} | {
    f"muon, {m}": ("muon", partial(muon, mistake=m), DECAY)
    for m in ("decay first", "no look ahead", "exchanged", "Jordan's length")
}


def example(shape, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=shape).astype(np.float32), rng.normal(size=(STEPS, *shape)).astype(np.float32)


def walk(opt, w, grads):
    p = {"a": {"b": mx.array(w)}}
    for g in grads: p = opt.apply_gradients({"a": {"b": mx.array(g)}}, p)
    return np.array(p["a"]["b"])


def shapes(name): return [(8, 8), (5, 12), (12, 5), (1, 6)] + ([] if "muon" in name else [(7,), ()])


@pytest.mark.parametrize("name, shape", [(name, shape) for name in PAPERS for shape in shapes(name)])
def test_optimizer_matches_its_paper(name, shape):
    "On matrices with decay, on vectors and scalars without."
    ours, paper = PAPERS[name]
    w, grads = example(shape)
    decay = DECAY if len(shape) > 1 else 0
    np.testing.assert_allclose(walk(ours(), w, grads), paper(w, grads, decay), atol=3e-6)


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("shape", [(8, 8), (12, 5)])
def test_comparison_detects_planted_mistakes(name, shape):
    right, mistake, decay = WRONG[name]
    w, grads = example(shape)
    ours = walk(PAPERS[right][0](), w, grads)
    with pytest.raises(AssertionError): np.testing.assert_allclose(ours, mistake(w, grads, decay), atol=3e-5)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_comparison_detects_decay_on_a_vector(name):
    w, grads = example((7,))
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(walk(PAPERS[name][0](), w, grads), PAPERS[name][1](w, grads, DECAY),
                                   atol=3e-5)


def test_mlx_muon_differs_by_its_decay():
    "MLX's own, scaled like ours: only its weight decay differs, and that is detected."
    w, grads = example((8, 8))
    stock = lambda decay: walk(optim.Muon(LR * 0.2 * 8**0.5, weight_decay=decay), w, grads)
    np.testing.assert_allclose(stock(0), walk(Muon(LR, weight_decay=0), w, grads), atol=3e-5)
    assert np.abs(stock(DECAY) - walk(Muon(LR, weight_decay=DECAY), w, grads)).max() > 1e-3


# ---- orthogonalisation

@pytest.mark.parametrize("shape", [(64, 64), (64, 160), (160, 64), (1, 9), (9, 1)])
@pytest.mark.parametrize("smallest", [1.0, 0.1, 0.01])
def test_orthogonalize_singular_values_are_about_one(shape, smallest):
    "The smallest is 1% of the largest, which is above 0.0016 of the norm for these sizes."
    n, rng = min(shape), np.random.default_rng(0)
    u, v = np.linalg.qr(rng.normal(size=(shape[0], n)))[0], np.linalg.qr(rng.normal(size=(shape[1], n)))[0]
    out = np.array(orthogonalize(mx.array((u * np.geomspace(1, smallest, n)) @ v.T)), dtype=float)
    values = np.linalg.svd(out, compute_uv=False)
    assert out.shape == shape and 0.68 < values.min() and values.max() < 1.21
    assert np.abs(u.T @ out @ v - np.diag(np.diag(u.T @ out @ v))).max() < 1e-3  # the same directions


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_orthogonalize_is_scale_invariant(scale):
    g = mx.random.normal((8, 20), key=mx.random.key(0))
    np.testing.assert_allclose(np.array(orthogonalize(g * scale)), np.array(orthogonalize(g)), atol=1e-4)


def test_norm_of_a_large_matrix_is_accurate():
    "The naive sum of 16 million squares loses 1.7% on a CPU; one round is a function of the norm."
    x = mx.random.normal((4096, 4096), key=mx.random.key(0))
    norm = np.linalg.norm(np.array(x, dtype=float))
    first = np.array(orthogonalize(x, rounds=0))[0].astype(float)
    np.testing.assert_allclose(first, np.array(x)[0] / norm, rtol=1e-5)


def test_muon_update_size():
    "RMS of a first step: 0.2 of the rate times that of the singular values, which is in the band."
    for shape in [(64, 64), (32, 256), (256, 32)]:
        g = mx.random.normal(shape, key=mx.random.key(1))
        new = Muon(1.0, weight_decay=0).apply_gradients({"w": g}, {"w": mx.zeros(shape)})["w"]
        rms = mx.sqrt(mx.square(new).mean()).item() / 0.2
        # a square one has values near zero
        assert 0.68 < rms < 1.21 or shape == (64, 64) and 0.6 < rms < 1.21


# ---- on a model, compiled, saved, continued

SIZES = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=1, head_dim=8)


class Scored(nn.Module):
    "A Llama and a scalar head, as in a reward model."
    def __init__(self, **sizes):
        super().__init__()
        self.backbone, self.head = Llama(LlamaArgs(**SIZES, **sizes)), ScalarHead(16)
        self.head.score.weight = self.head.score.weight + 0.01

    def __call__(self, ids):
        return self.backbone(ids), self.head(self.backbone.hidden(ids))


def frozen():
    "Only the second block learns."
    model = Scored()
    model.freeze()
    model.backbone.model.layers[1].unfreeze()
    return model


def head_only():
    "Nothing is left for Muon."
    model = Scored()
    model.freeze()
    model.head.unfreeze()
    return model


MODELS = {"tied": Scored, "untied": partial(Scored, tie_word_embeddings=False), "frozen": frozen,
          "head only": head_only}


def loss(model, ids):
    logits, scores = model(ids[:, :-1])
    return nn.losses.cross_entropy(logits, ids[:, 1:]).mean() + mx.square(scores - 1).mean()


def stepper(model, opt, compiled=True):
    opt.init(model.trainable_parameters())
    state, gradient = [model.state, opt.state], nn.value_and_grad(model, loss)

    def step(ids, rate):
        value, grads = gradient(model, ids)
        opt.learning_rate = rate
        opt.update(model, grads)
        return value

    return mx.compile(step, inputs=state, outputs=state) if compiled else step


def ids_at(step): return mx.random.randint(0, 64, (2, 9), key=mx.random.key(step))


def train(step, first, last):
    return [step(ids_at(s), mx.array(0.01 * (s + 1) / last)).item() for s in range(first, last)]


def put_back(tree, saved):
    for name, value in saved.items():
        *path, last = name.split(".")
        place = tree
        for part in path: place = place[int(part)] if isinstance(place, list) else place[part]
        assert last in place
        place[last] = value


def same(a, b):
    a, b = dict(tree_flatten(a)), dict(tree_flatten(b))
    return a.keys() == b.keys() and all(mx.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", NAMES)
def test_resume_is_bit_identical(name, kind, tmp_path):
    cfg = Optimization(optimizer=name)
    model, opt = MODELS[kind](), make_optimizer(cfg, 0.01, 0.1)
    step = stepper(model, opt)
    train(step, 0, 3)
    for part, tree in {"model": model.parameters(), "opt": opt.state}.items():
        mx.save_safetensors(str(tmp_path / part), dict(tree_flatten(tree)))
    losses, start = train(step, 3, 6), dict(tree_flatten(MODELS[kind]().parameters()))
    fresh, again = MODELS[kind](), make_optimizer(cfg, 0.01, 0.1)
    step = stepper(fresh, again)
    put_back(fresh, mx.load(str(tmp_path / "model.safetensors")))
    put_back(again.state, mx.load(str(tmp_path / "opt.safetensors")))
    assert train(step, 3, 6) == losses
    assert same(model.parameters(), fresh.parameters()) and same(opt.state, again.state)
    moved = {n for n, w in tree_flatten(model.parameters()) if not mx.array_equal(w, start[n])}
    # all that should, and nothing else
    assert moved == {n for n, _ in tree_flatten(model.trainable_parameters())}


@pytest.mark.parametrize("name", NAMES)
def test_forgotten_state_is_detected(name):
    model, opt = Scored(), make_optimizer(Optimization(optimizer=name), 0.01, 0.1)
    step = stepper(model, opt)
    train(step, 0, 3)
    fresh, again = Scored(), make_optimizer(Optimization(optimizer=name), 0.01, 0.1)
    other = stepper(fresh, again)
    put_back(fresh, dict(tree_flatten(model.parameters())))
    assert train(other, 3, 6) != train(step, 3, 6)


@pytest.mark.linux
@pytest.mark.parametrize("name", NAMES)
def test_compiled_equals_uncompiled(name):
    "Bit for bit, where the compiler does not fuse multiply and add: measured on Linux, x86-64."
    a, b = MODELS["untied"](), MODELS["untied"]()
    ours = make_optimizer(Optimization(optimizer=name), 0.01, 0.1)
    plain = make_optimizer(Optimization(optimizer=name), 0.01, 0.1)
    assert train(stepper(a, ours), 0, 5) == train(stepper(b, plain, compiled=False), 0, 5)
    assert same(a.parameters(), b.parameters()) and same(ours.state, plain.state)


@pytest.mark.parametrize("name", NAMES)
def test_optimizer_uses_the_given_learning_rate(name):
    "A rate of zero from the first step changes nothing; a later rate changes every parameter."
    model, opt = MODELS["untied"](), make_optimizer(Optimization(optimizer=name), 123.0, 0.1)
    step, start = stepper(model, opt), dict(tree_flatten(MODELS["untied"]().parameters()))
    for s in range(2): step(ids_at(s), mx.array(0.0))
    assert same(model.parameters(), start)
    step(ids_at(2), mx.array(0.25))
    assert not any(mx.array_equal(w, start[n]) for n, w in tree_flatten(model.parameters()))
    assert {o.learning_rate.item() for o in getattr(opt, "optimizers",
                                                    [opt])} == {0.25} and opt.learning_rate.item() == 0.25


@pytest.mark.parametrize("path, hidden", [
    ("model.layers.0.self_attn.q_proj.weight", True), ("model.layers.0.mlp.up_proj.lora_a", True),
    ("model.embed_tokens.weight", False),
    ("policy.lm_head.weight", False), ("value.score.weight", False), ("model.scores.weight", True)])
def test_is_hidden(path, hidden):
    assert is_hidden(path, mx.zeros((2, 2))) == hidden
    assert not is_hidden(path, mx.zeros(2)) and not is_hidden(path, mx.zeros((2, 2, 2)))


def test_muon_and_adamw_share_the_model():
    opt = make_optimizer(Optimization(optimizer="muon", betas=(0.8, 0.9), eps=1e-5, momentum=0.5), 0.01, 0.3)
    opt.init(MODELS["untied"]().trainable_parameters())
    for_muon, for_adamw = ({n.rsplit(".", 1)[0] for n, _ in tree_flatten(o.state) if n.endswith(".v")}
                           for o in opt.optimizers)
    every = {n: w for n, w in tree_flatten(MODELS["untied"]().trainable_parameters())}
    assert for_muon | for_adamw == every.keys() and not for_muon & for_adamw and len(for_muon) == 2 * 7
    left, right = opt.optimizers
    assert (left.momentum, left.weight_decay, right.betas, right.eps,
            right.weight_decay) == (0.5, 0.3, [0.8, 0.9], 1e-5, 0.3)


# ---- what users bring

@pytest.mark.parametrize("make, sentence", [
    (lambda: optim.Lion(optim.cosine_decay(1e-3, 10)), "Lion has a schedule of its own"),
    (lambda: AdamW(lambda step: 1e-3), "AdamW has a schedule of its own"),
    (lambda: Muon(optim.linear_schedule(0, 1e-3, 10)), "Muon has a schedule of its own"),
    (lambda: optim.MultiOptimizer([SGD(0.1), Adam(lambda step: 1e-3)], [is_hidden]),
     "Adam has a schedule of its own"),
    (optim.Adafactor, "Adafactor chooses its own"),
    (lambda: optim.Adafactor(1e-3), "Adafactor chooses its own"),
    (lambda: None, "of the type NoneType"),
])
def test_optimizers_with_own_schedule_are_refused(make, sentence):
    with pytest.raises(ConfigError, match=sentence) as caught: check_optimizer(make())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make", [
    lambda: optim.Lion(1e-3), lambda: optim.Adafactor(1e-3, relative_step=False), lambda: optim.RMSprop(1e-3),
    *(partial(make_optimizer, Optimization(optimizer=n), 1e-3, 0.1) for n in NAMES)])
def test_accepted_optimizers_use_our_rate(make):
    "An accepted optimizer changes nothing at a rate of zero, and something at another."
    check_optimizer(opt := make())
    model, start = Scored(), dict(tree_flatten(Scored().parameters()))
    step = stepper(model, opt)
    step(ids_at(0), mx.array(0.0))
    assert same(model.parameters(), start)
    step(ids_at(1), mx.array(1e-3))
    assert not same(model.parameters(), start)


def test_refused_optimizer_would_have_moved():
    for opt in (optim.SGD(optim.cosine_decay(1.0, 100)), optim.Adafactor()):
        opt.learning_rate = 0.0
        assert opt.apply_gradients({"w": mx.ones((2, 2))}, {"w": mx.ones((2, 2))})["w"][0, 0].item() != 1.0


def test_schedules_return_numbers():
    assert all(isinstance(make_schedule(SchedulerConfig(type=shape), 1, 10)(s), float) for shape in SHAPES
               for s in range(12))
    assert math.isfinite(make_schedule(SchedulerConfig(type="wsd", decay_ratio=1.0), 1.0, 1)(5))
