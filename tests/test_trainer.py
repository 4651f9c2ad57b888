"Ctrl-C at any moment: the checkpoint's step, its optimizer and its weights must be of one age."
import signal
from typing import NamedTuple

import numpy as np
import pytest

import mlx_pretrain  # noqa: F401, I001 (before MLX)

import mlx.core as mx

from mlx_pretrain.core import key_for
from mlx_pretrain.model import Linear, project
from mlx_pretrain.run import Run, checkpoints, load_checkpoint
from mlx_pretrain.trainer import Trainer, stop_between_steps, train_run


class Points(NamedTuple):
    x: mx.array
    y: mx.array


def points_at(step):
    x = mx.random.normal((512, 256), key=key_for(0, step, "points"))
    return Points(x, x.sum(axis=1))


def squares(model, batch): return ((project(batch.x, model)[0][:, 0] - batch.y) ** 2).sum(), mx.array(512)


def weights_after(steps):
    twin = Trainer(Linear(256, 1), squares, points_at, 10_000)
    for _ in range(steps): twin.step()
    return twin.model.weight


def interrupt_after(seconds):
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    signal.setitimer(signal.ITIMER_REAL, seconds)


@pytest.mark.parametrize("delay", np.random.default_rng(0).uniform(0.2, 0.5, 12).round(4).tolist())
def test_an_interrupted_run_saves_one_age(delay, tmp_path):
    run = Run("line", "seed: 0\n", root=tmp_path)
    trainer = Trainer(Linear(256, 1), squares, points_at, 10_000, run=run)
    trainer.step()  # compiled before the clock starts
    interrupt_after(delay)
    with pytest.raises(KeyboardInterrupt): train_run(trainer, run, lambda: pytest.fail("it was not finished"))
    arrays, state = load_checkpoint(checkpoints(run.path)[-1])
    assert 0 < state["step"] == arrays["optimizer"]["step"].item() < 10_000
    assert state["tokens"] == 512 * state["step"]
    assert mx.array_equal(arrays["model"]["weight"], weights_after(state["step"]))


def test_an_interrupted_overwrite_leaves_the_old_run(tmp_path):
    run = Run("line", "seed: 0\n", root=tmp_path)
    train_run(Trainer(Linear(256, 1), squares, points_at, 3, run=run), run, lambda: (run.path / "model").mkdir())
    again = Run("line", "seed: 1\n", root=tmp_path, overwrite=True)

    def impatient(step):
        signal.raise_signal(signal.SIGINT)
        return points_at(step)

    trainer = Trainer(Linear(256, 1), squares, impatient, 10_000, run=again)
    with pytest.raises(KeyboardInterrupt): train_run(trainer, again, lambda: None)
    assert trainer.steps_done == 1 and (tmp_path / "line" / "model").is_dir()
    assert [p.name for p in checkpoints(tmp_path / "line")] == ["step_000003"]


def test_a_stopped_trainer_goes_on(tmp_path):
    trainer = Trainer(Linear(256, 1), squares, points_at, 20)
    trainer.callbacks.append(lambda trainer, metrics: metrics["step"] == 5 and signal.raise_signal(signal.SIGINT))
    with stop_between_steps(trainer): trainer.run()
    assert trainer.steps_done == 5
    assert trainer.run()["step"] == 20


def test_an_ignored_interrupt_stays_ignored():
    trainer, before = Trainer(Linear(256, 1), squares, points_at, 3), signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_between_steps(trainer): assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally: signal.signal(signal.SIGINT, before)


def test_the_handler_is_put_back(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    run = Run("line", "seed: 0\n", root=tmp_path)
    train_run(Trainer(Linear(256, 1), squares, points_at, 3, run=run), run, lambda: None)
    assert signal.getsignal(signal.SIGINT) is before
