"The trainer: interrupts at any moment, timing, gradient accumulation, non-finite losses and gradients."
import json
import signal
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest

import mlx_pretrain  # noqa: F401, I001 (before MLX)

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

from mlx_pretrain import step as step_module
from mlx_pretrain.checkpoint import load_checkpoint
from mlx_pretrain.cli import main
from mlx_pretrain.core import key_for
from mlx_pretrain.model import Linear, Llama, ModelConfig, project
from mlx_pretrain.ops import head_loss
from mlx_pretrain.optim import Optimization, make_optimizer
from mlx_pretrain.pretrained import load
from mlx_pretrain.run import (
    LoggingConfig, Run, RunError, StepsConfig, checkpoints, latest_checkpoint, read_metrics)
from mlx_pretrain.session import forecast, recording
from mlx_pretrain.step import Update
from mlx_pretrain.trainer import MAX_SKIPPED, Trainer, TrainingError, stop_between_steps


class Points(NamedTuple):
    x: mx.array
    y: mx.array


def points_at(step):
    x = mx.random.normal((512, 256), key=key_for(0, step, "points"))
    return Points(x, x.sum(axis=1))


def squares(model, batch): return ((project(batch.x, model)[0][:, 0] - batch.y) ** 2).sum(), mx.array(512)


def train(trainer, run, finalize=lambda: None):
    with recording(trainer, run, finalize): trainer.run()


def never(): pytest.fail("it was not finished")


def weights_after(steps):
    twin = Trainer(Linear(256, 1), squares, points_at, 10_000)
    for _ in range(steps): twin.step()
    return twin.model.weight


def interrupt_after(seconds):
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    signal.setitimer(signal.ITIMER_REAL, seconds)


@pytest.mark.parametrize("delay", np.random.default_rng(0).uniform(0.2, 0.5, 12).round(4).tolist())
def test_interrupt_saves_a_consistent_state(delay, tmp_path):
    run = Run("line", "seed: 0\n", root=tmp_path)
    trainer = Trainer(Linear(256, 1), squares, points_at, 10_000, run=run)
    trainer.step()  # compiled before the clock starts
    interrupt_after(delay)
    with pytest.raises(KeyboardInterrupt): train(trainer, run, never)
    arrays, state = load_checkpoint(checkpoints(run.path)[-1])
    assert 0 < state["step"] == arrays["optimizer"]["step"].item() < 10_000
    assert state["progress"]["tokens"] == 512 * state["step"]
    assert mx.array_equal(arrays["model"]["weight"], weights_after(state["step"]))


def test_interrupted_overwrite_keeps_the_old_run(tmp_path):
    run = Run("line", "seed: 0\n", root=tmp_path)
    train(Trainer(Linear(256, 1), squares, points_at, 3, run=run), run, (run.path / "model").mkdir)
    again = Run("line", "seed: 1\n", root=tmp_path, overwrite=True)

    def interrupted_points(step):
        signal.raise_signal(signal.SIGINT)
        return points_at(step)

    trainer = Trainer(Linear(256, 1), squares, interrupted_points, 10_000, run=again)
    with pytest.raises(KeyboardInterrupt): train(trainer, again)
    assert trainer.steps_done == 1 and (tmp_path / "line" / "model").is_dir()
    assert [p.name for p in checkpoints(tmp_path / "line")] == ["step_000003"]
    assert [p.name for p in checkpoints(tmp_path / "line-2")] == [
        "step_000001"
    ] and again.path == tmp_path / "line-2"
    assert json.loads((tmp_path / "line-2" / "metadata.json").read_text())["name"] == "line-2"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["line", "line-2"]


def test_stopped_trainer_resumes(tmp_path):
    trainer = Trainer(Linear(256, 1), squares, points_at, 20)
    trainer.callbacks.append(lambda trainer, metrics: metrics["step"] == 5
                             and signal.raise_signal(signal.SIGINT))
    trainer.run()
    assert trainer.steps_done == 5
    assert trainer.run()["step"] == 20


LINE = """
import mlx_pretrain
import mlx.core as mx
from typing import NamedTuple
from mlx_pretrain.model import Linear, project
from mlx_pretrain.trainer import Trainer
class Points(NamedTuple): x: mx.array
def loss(model, batch): return (project(batch.x, model)[0] ** 2).sum(), mx.array(64)
def begun(trainer, metrics):
    if metrics["step"] == 3: print("begun", flush=True)
trainer = Trainer(Linear(8, 1), loss, lambda step: Points(mx.ones((64, 8))), 10**7, callbacks=[begun])
trainer.run();
"""


def test_stop_button_in_a_notebook():
    "The button interrupts the kernel: the cell ends without an error, and the state is consistent."
    from jupyter_client import KernelManager
    from jupyter_client.kernelspec import KernelSpecManager
    kernel = KernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    kernel.start_kernel(extra_arguments=["--log-level=40"])
    client = kernel.client()
    client.start_channels()

    def run(code, until_begun=lambda: None):
        "What a cell prints; `until_begun` is called when it prints `begun`."
        output, mine = "", client.execute(code)
        while True:
            message = client.get_iopub_msg(timeout=60)
            if message["parent_header"].get("msg_id") != mine: continue
            assert message["msg_type"] != "error", message["content"]
            if message["msg_type"] == "stream": output += message["content"]["text"]
            if message["msg_type"] == "stream" and "begun" in message["content"]["text"]: until_begun()
            if message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
                return output

    try:
        client.wait_for_ready(timeout=60)
        output = run(LINE, kernel.interrupt_kernel)
        assert "Stopping after this step" in output and "it can be resumed" in output
        assert run("n = trainer.steps_done; print(3 <= n < 10**7)") == "True\n"
        assert run("print(trainer.optimizer.step.item() == n, trainer.tokens == 64 * n)") == "True True\n"
        assert run("trainer.total_steps = n + 5; print(trainer.run()['step'] == n + 5)") == "True\n"
    finally:
        client.stop_channels()
        kernel.shutdown_kernel(now=True)


def test_second_interrupt_is_immediate():
    def interrupted_points(step):
        if trainer.steps_done == 3 and not pressed:
            pressed.extend(signal.raise_signal(signal.SIGINT) for _ in range(2))
        return points_at(step)
    pressed = []
    trainer = Trainer(Linear(256, 1), squares, interrupted_points, 20)
    with pytest.raises(KeyboardInterrupt): trainer.run()
    assert trainer.steps_done == trainer.optimizer.step.item() == 3
    pressed.append("enough")
    assert trainer.run()["step"] == 20 and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ignored_signal_stays_ignored():
    trainer = Trainer(Linear(256, 1), squares, points_at, 3)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_between_steps(trainer): assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally: signal.signal(signal.SIGINT, before)


def test_signal_handler_is_restored(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    run = Run("line", "seed: 0\n", root=tmp_path)
    train(Trainer(Linear(256, 1), squares, points_at, 3, run=run), run)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("interrupted", [True, False])
def test_ctrl_c_that_ends_the_compiler_too(interrupted):
    "In a terminal the compiler receives Ctrl-C too: that is no error, but its failure without Ctrl-C is."
    def compile_fails(step):
        if trainer.steps_done != 2 or failed: return points_at(step)
        failed.append(step)
        if interrupted: signal.raise_signal(signal.SIGINT)
        raise RuntimeError(
            "[Compile::eval_cpu] Failed to compile function x: g++: Interrupt signal terminated program"
        )
    failed, trainer = [], None
    trainer = Trainer(Linear(256, 1), squares, compile_fails, 5)
    if interrupted: trainer.run()
    else:
        with pytest.raises(RuntimeError): trainer.run()
    assert trainer.steps_done == 2
    trainer.run()
    (twin := Trainer(Linear(256, 1), squares, points_at, 5)).run()
    assert trainer.steps_done == 5 and mx.array_equal(trainer.model.weight, twin.model.weight)


# The time of a step


class Machine:
    "A clock that only batches advance, and a compiler that takes 40 s for the first batch of each kind."
    def __init__(self, monkeypatch, seconds, kinds=1, busy=40.0):
        self.now, self.compiled, self.seconds, self.kinds, self.taken = 0.0, set(), seconds, kinds, []
        clock = SimpleNamespace(perf_counter=lambda: self.now, monotonic=lambda: self.now)
        monkeypatch.setattr(step_module, "time", clock)
        monkeypatch.setattr(step_module, "_compiler_activity",
                            lambda: (len(self.compiled), busy * len(self.compiled)))

    def batches_at(self, step):
        self.taken.append(step)
        self.now += self.seconds if step % self.kinds in self.compiled else self.seconds + 40
        self.compiled.add(step % self.kinds)
        return points_at(step)

    def trainer(self, steps): return Trainer(Linear(256, 1), squares, self.batches_at, steps)


@pytest.mark.parametrize("seconds, kinds, steps, probes", [
    (0.1, 1, 100, 12),                                         # short: once to compile, once to be timed
    (0.1, 4, 100, 12), (0.1, 8, 100, 13), (0.1, 1, 1, 2), (3, 2, 50, 4), (60, 1, 50, 2), (60, 3, 50, 4)])
def test_forecast_excludes_compile_time(seconds, kinds, steps, probes, monkeypatch):
    "Fails if a step's time contains 40 s of compilation, or if long steps are timed too often."
    machine = Machine(monkeypatch, seconds, kinds, busy=20.0)  # other programs have the other half
    ahead = forecast(machine.trainer(steps))
    assert ahead.seconds == pytest.approx(steps * seconds) and ahead.tokens_per_second == pytest.approx(
        512 / seconds
    )
    assert len(machine.taken) <= probes


def test_long_step_is_timed_once(monkeypatch):
    machine = Machine(monkeypatch, 60)
    machine.compiled.add(0)
    assert forecast(machine.trainer(50)).seconds == pytest.approx(3000) and len(machine.taken) == 1


def test_tokens_per_second_excludes_compile_time(monkeypatch):
    machine = Machine(monkeypatch, 2, kinds=2)
    trainer = machine.trainer(4)
    speeds = [trainer.step()["tokens_per_second"] for _ in range(4)]
    assert speeds == pytest.approx([256] * 4) and trainer.seconds == pytest.approx(8)


# Parts of a step


class Ids(NamedTuple):
    ids: mx.array
    loss_mask: mx.array


def next_id(model, batch):
    return head_loss(model.hidden(batch.ids[:, :-1]), model.head_weight, batch.ids[:, 1:], batch.loss_mask)


@pytest.mark.parametrize("parts", [
    [(0, 1), (1, 2), (2, 8)], [(0, 5), (5, 8)], [(i, i + 1) for i in range(8)]])
def test_unequal_micro_batches_equal_the_full_batch(parts):
    "Rows with one to eight tokens, in unequal micro-batches; the mean of their means must be detected."
    model = Llama(
        ModelConfig.model_validate_json('{"dimensions": {"hidden_size": 16, "num_layers": 1}}').args(32)
    )
    ids = mx.random.randint(0, 32, (8, 9), key=mx.random.key(0))
    batch = Ids(ids, mx.arange(8)[None] <= mx.arange(8)[:, None])
    update = Update(model, make_optimizer(Optimization(), 0.0, 0.0), next_id, 1.0)
    pieces = [Ids(*(z[a:b] for z in batch)) for a, b in parts]
    (total, count), whole = update.gradient(batch)
    sums = [update.gradient(piece) for piece in pieces]
    assert sum(n.item() for (_, n), _ in sums) == count.item() == 36
    means = tree_map(lambda *gs: sum(g / n for g, ((_, n), _) in zip(gs, sums)) / len(sums),
                     *(g for _, g in sums))
    for (name, want), *others in zip(*(tree_flatten(g) for g in (whole, *(g for _, g in sums), means))):
        *got, wrong = (g for _, g in others)
        scale = mx.abs(want).max()
        assert mx.abs(sum(got) - want).max() < 1e-5 * scale, name
        if name.endswith("weight") and want.ndim > 1:
            assert mx.abs(wrong - want / count).max() > 0.05 * scale / count, name
    together, apart = update([batch], 0.0), update(pieces, 0.0)
    assert (
        abs(together[0].item() - apart[0].item()) < 1e-5
        and abs(together[2].item() / apart[2].item() - 1) < 1e-4
    )


# Non-finite losses and gradients


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "muon", "sgd"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_non_finite_step_changes_no_bit(optimizer, poison):
    model = Linear(4, 4)
    opt = make_optimizer(Optimization(optimizer=optimizer), 0.1, 0.1)
    update = Update(model, opt, squares, 1.0)
    x = mx.random.normal((512, 4), key=mx.random.key(0))
    for _ in range(3): update([Points(x, x.sum(axis=1))], 0.1)
    before = tree_flatten([model.parameters(), opt.state])
    assert len(before) > 3
    *_, good = update([Points(x * mx.where(mx.arange(512) == 7, poison, 1.0)[:, None], x.sum(axis=1))], 0.1)
    assert not good.item()
    for (name, old), (_, new) in zip(before, tree_flatten([model.parameters(), opt.state])):
        assert mx.array_equal(old, new), name
    *_, good = update([Points(x, x.sum(axis=1))], 0.1)
    assert good.item() and not mx.array_equal(model.weight, before[0][1])


def test_divergence_names_the_last_good_checkpoint(tmp_path):
    def batches_at(step):
        return points_at(step) if step < 23 else Points(points_at(step).x * float("nan"), points_at(step).y)
    run = Run("line", "seed: 0\n", root=tmp_path)
    trainer = Trainer(Linear(256, 1), squares, batches_at, 10_000, run=run)
    trainer.callbacks.append(lambda trainer, metrics: metrics["step"] == 20
                             and run.save_checkpoint(20, trainer.arrays(), trainer.state()))
    with pytest.raises(
        TrainingError,
        match=rf"{MAX_SKIPPED} steps in a row, up to step 33; .* last good checkpoint is .*step_000020$",
    ):
        train(trainer, run, never)
    assert mx.array_equal(trainer.model.weight, weights_after(23))
    assert [row["step"] for row in read_metrics(run.path)
            if row.get("event") == "not_finite"] == [*range(23, 33)]
    assert json.loads((run.path / "metadata.json").read_text())["outcome"] == "failed"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_loss_with_finite_gradient(bad):
    "The gradient is finite, because a constant makes the loss infinite."
    model = Linear(4, 1)
    def loss(model, batch): return squares(model, batch)[0] + bad, mx.array(512)
    update = Update(model, make_optimizer(Optimization(), 0.1, 0.1), loss, 1.0)
    value, _, norm, good = update([Points(*(z[..., :4] if z.ndim > 1 else z for z in points_at(0)))], 0.1)
    assert (
        not mx.isfinite(value).item()
        and mx.isfinite(norm).item()
        and not good.item()
        and not model.weight.any().item()
    )


def test_non_finite_val_loss_is_never_the_best():
    trainer = Trainer(Linear(256, 1), squares, points_at, 100)
    for loss in (float("nan"), 3.0, float("inf"), float("nan"), 4.0): trainer.record_best(loss)
    assert trainer.best == (0, 3.0)


def fit(tmp_path, total=100, keep_last=1, interval=1000, bad=(), val=lambda step: 1.0, **kwargs):
    "A linear regression with given non-finite steps (`bad`) and validation losses (`val`)."
    def batches_at(step):
        return Points(points_at(step).x * (float("nan") if step + 1 in bad else 1), points_at(step).y)
    logging = LoggingConfig(keep_last=keep_last, steps=StepsConfig(checkpoint_interval=interval))
    run = Run("line", "seed: 0\n", root=tmp_path, logging=logging)
    trainer = Trainer(Linear(256, 1), squares, batches_at, total, run=run, held_out=[points_at(0)],
                      validation_interval=10, **kwargs)
    trainer.evaluate = lambda: {"val_loss": val(trainer.steps_done)}
    train(trainer, run)
    return trainer, [int(path.name[5:]) for path in checkpoints(run.path)]


def test_best_checkpoint_is_kept(tmp_path):
    assert fit(tmp_path, val=lambda step: abs(step - 30))[1] == [30, 100]


def test_best_checkpoint_is_kept_if_its_step_was_skipped(tmp_path):
    trainer, kept = fit(tmp_path, val=lambda step: abs(step - 30), bad={30})
    assert trainer.best == (30, 0) and kept == [30, 100]


def test_skipped_step_is_not_saved(tmp_path):
    assert fit(tmp_path, keep_last=99, interval=20, bad={40},
               val=lambda step: step)[1] == [10, 20, 60, 80, 100]


def test_last_step_is_always_evaluated(tmp_path):
    fit(tmp_path, total=25)
    assert [row["step"] for row in read_metrics(tmp_path / "line") if "val_loss" in row] == [10, 20, 25]


def test_checkpoint_after_some_minutes(tmp_path, monkeypatch):
    clock = iter(range(10_000))
    # every look at the clock is 100 s later
    monkeypatch.setattr("mlx_pretrain.session.time.monotonic", lambda: 100 * next(clock))
    assert len(fit(tmp_path, keep_last=99, val=lambda step: step)[1]) > 5


def test_checkpoint_stores_skipped_steps(tmp_path):
    trainer, _ = fit(tmp_path, bad={98, 99, 100})
    saved, twin = latest_checkpoint(tmp_path / "line"), Trainer(Linear(256, 1), squares, points_at, 200)
    twin.load(saved)
    assert (twin.skipped, twin.in_a_row, twin.best, twin.losses) == (3, 3, trainer.best, trainer.losses)


@pytest.mark.parametrize("interval", [1000, 10])
@pytest.mark.parametrize("at", [20, 25])
@pytest.mark.parametrize("what", ["validation", "metrics"])
def test_unrecorded_step_is_recorded_at_resume(tmp_path, monkeypatch, what, at, interval):
    "Its weights are saved, so it is not repeated; mid-run and at the end, with and without a checkpoint due."
    def without_speed(path):
        return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in read_metrics(path)]
    fit(tmp_path / "whole", 25, interval=interval)
    log, bad = Run.log, [True]
    def refuse(step, here):
        if step == at and what == here and bad: raise RunError("No space left.")
    def broken(run, metrics):
        refuse(metrics["step"], "metrics")
        log(run, metrics)
    def val(step):
        refuse(step, "validation")
        return 1.0
    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", broken)
        with pytest.raises(RunError): fit(tmp_path / "cut", 25, interval=interval, val=val)
    saved = latest_checkpoint(tmp_path / "cut/line")
    assert saved.state["step"] == at and saved.state["unfinished"]["step"] == at
    run = Run.resume(saved, "line", "seed: 0\n", root=tmp_path / "cut")
    trainer = Trainer(Linear(256, 1), squares, points_at, 25, run=run, held_out=[points_at(0)],
                      validation_interval=10)
    trainer.evaluate = lambda: {"val_loss": 1.0}
    trainer.load(saved)
    train(trainer, run)
    assert [row for row in without_speed(run.path)
            if "event" not in row] == without_speed(tmp_path / "whole/line")
    ends = [load_checkpoint(checkpoints(tmp_path / which / "line")[-1]) for which in ("whole", "cut")]
    assert ends[0][1] == ends[1][1] and mx.array_equal(*(arrays["model"]["weight"] for arrays, _ in ends))


def test_knob_changes_are_logged(tmp_path):
    def turn(trainer, metrics):
        trainer.knobs.learning_rate_factor = (
            0.5 if metrics["step"] == 7 else trainer.knobs.learning_rate_factor
        )
    fit(tmp_path, callbacks=[turn])
    events = [(row["step"], row["name"], row["value"])
              for row in read_metrics(tmp_path / "line") if row.get("event") == "knob"]
    assert events == [(7, "learning_rate_factor", 0.5)]


def test_ctrl_c_during_step_leaves_a_consistent_state():
    "Interrupted in a loop of step() calls: step counters, optimizer state and weights agree."
    trainer = Trainer(Linear(256, 1), squares, points_at, 10_000)
    trainer.step()
    for delay in np.random.default_rng(1).uniform(0.001, 0.05, 20):
        signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
        signal.setitimer(signal.ITIMER_REAL, delay)
        with pytest.raises(KeyboardInterrupt):
            while True: trainer.step()
        assert trainer.tokens == 512 * trainer.steps_done == 512 * trainer.optimizer.step.item()
    assert mx.array_equal(trainer.model.weight, weights_after(trainer.steps_done))


def test_single_bad_batch_is_skipped_and_counted(tmp_path):
    def batches_at(step):
        return points_at(step) if step != 23 else Points(points_at(step).x * float("nan"), points_at(step).y)
    run = Run("line", "seed: 0\n", root=tmp_path)
    trainer = Trainer(Linear(256, 1), squares, batches_at, 100, run=run)
    train(trainer, run)
    assert trainer.skipped == 1 and trainer.optimizer.step.item() == 99
    assert json.loads((run.path / "metadata.json").read_text())["took"]["skipped"] == 1


def test_much_too_high_learning_rate(tmp_path, monkeypatch, capfd):
    "The command reports it in one sentence, and nothing that is not finite is exported."
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"Line {i} of a short text."}) + "\n"
                                                 for i in range(20)))
    (tmp_path / "wild.yaml").write_text("""
data: {input_file: text.jsonl, preprocessing: {max_context_size: 16}}
model: {dimensions: {hidden_size: 16, num_layers: 1}}
training: {hyperparameters: {batch_size: 4, iters: 300, learning_rate: 1.0e+20}}
logging: {steps: {checkpoint_interval: 1}}
""")
    code, err = main(["train", "--config", "wild.yaml"]), capfd.readouterr().err
    assert (
        code == 2
        and "Traceback" not in err
        and "learning_rate" in err
        and "There is no good checkpoint" in err
    )
    assert not (tmp_path / "runs" / "wild" / "model").exists()
    assert all(mx.isfinite(w).all().item()
               for _, w in tree_flatten(load(checkpoints("runs/wild")[-1]).model.parameters()))
