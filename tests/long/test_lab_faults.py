"""The panel under attack: errors, ■ and Stop where they hurt, runs taken up again, and a playground that must not promise too much."""
import asyncio
import gc
import json
import os
import re
import signal
import threading
import time
import weakref
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import mlx_pretrain  # noqa: F401, I001 (before MLX)

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import test_lab
from common import tokenizer
from test_lab import at_rest, count_a, lines, make, press, same, until

from mlx_pretrain import lab, run
from mlx_pretrain.config import ConfigError, UserError
from mlx_pretrain.lab import Live, Panel, samples_table
from mlx_pretrain.model import Llama, LlamaArgs
from mlx_pretrain.playground import Playground, tokenize_row
from mlx_pretrain.pretrained import Pretrained
from mlx_pretrain.prompt import PromptFormat
from mlx_pretrain.run import _writer, checkpoints, read_metadata, read_metrics
from mlx_pretrain.sft import SFTConfig, SFTTrainer
from mlx_pretrain.trainer import Knobs, Trainer, TrainingError, replay_knobs

jupyter = test_lab.jupyter


def events(run):
    return [(row["step"], row["name"], row["value"])
            for row in read_metrics(run) if row.get("event") == "knob"]
def outcome(live): return read_metadata(live.trainer.run_dir.path)["outcome"]
def hit(times=1): [os.kill(os.getpid(), signal.SIGINT) for _ in range(times)]


def going_on(trainer, **changes):
    "The trainer, told to go on with its run."
    resume = trainer.cfg.resume.model_copy(update={"checkpoint": "latest"})
    trainer.cfg = trainer.cfg.model_copy(update={"resume": resume, **changes})
    return trainer


def once(true, what):
    "A callback or reward part that does something the first time that something is so."
    done = []
    def call(*args):
        if done or not true(*args): return
        done.append(1)
        what()
    return call


def fail(): raise ValueError("no more")


async def finished(live): await until(lambda: live.is_over and at_rest(live))


async def stopped(live):
    press(live, "stop")
    await until(lambda: at_rest(live) and not live._actions)


async def gone_on(live):
    press(live, "run")
    await finished(live)


# What is counted is written down


@pytest.mark.parametrize("times", [1, 2])
def test_interrupt_in_a_callback(times, tmp_path, jupyter):
    "■, once or twice, while a step is looked at by callbacks: the step stands in the log, for it is counted."
    async def main():
        trainer = make("ppo", tmp_path, steps=6)
        live = Live(trainer, tmp_path / "runs")
        live.start()
        trainer.callbacks.insert(1, once(lambda t, m: m["step"] == 3, lambda: hit(times)))
        await until(lambda: live.trainer.steps_done >= 3 and at_rest(live))
        await gone_on(live)
        return live
    live = asyncio.run(main())
    assert [row["step"] for row in lines(live.trainer.run_dir.path)] == [*range(1, 7)]
    assert [*live.curves["reward"][0]] == [*range(1, 7)]


def test_interrupt_twice_in_a_validation(tmp_path, jupyter):
    "■ twice while held-out data are measured: that measurement is lost, the step is not, and it goes on."
    async def main():
        trainer = make("pretrain", tmp_path, steps=6)
        trainer.validation_interval, evaluate = 3, trainer.evaluate
        cut = once(lambda: trainer.steps_done == 3, lambda: hit(2))
        trainer.validate = lambda: (cut(), evaluate())[1]
        live = Live(trainer, tmp_path / "runs")
        live.start()
        await until(lambda: live.trainer.steps_done >= 3 and at_rest(live))
        await gone_on(live)
        return live
    live = asyncio.run(main())
    assert [*live.curves["loss"][0]] == [*range(1, 7)] and [*live.curves["val_loss"][0]] == [6]
    assert [row["step"] for row in lines(live.trainer.run_dir.path)] == [1, 6] and outcome(live) == "finished"


def test_a_watch_that_fails(tmp_path, jupyter):
    "A watched function that fails once costs no line of the log."
    async def main():
        trainer = make("ppo", tmp_path, steps=6)
        live = Live(trainer, tmp_path / "runs",
                    extra_metrics={"drift": lambda t: 1 / 0 if t.steps_done == 3 else 1.0})
        live.start()
        await until(lambda: live.trainer.steps_done >= 3 and at_rest(live))
        assert "ZeroDivisionError" in live.panel.message.value
        await gone_on(live)
        return live
    live = asyncio.run(main())
    assert [row["step"] for row in lines(live.trainer.run_dir.path)] == [*range(1, 7)]


@pytest.mark.parametrize("value", [np.ones(2), None, "no number"])
def test_a_watch_that_gives_no_number(value, tmp_path, jupyter):
    "What is watched and is no number is a sentence, and costs no line of the log."
    async def main():
        live = Live(make("ppo", tmp_path, steps=3), tmp_path / "runs", extra_metrics={"odd": lambda t: value})
        live.start()
        for _ in range(3):
            await until(lambda: at_rest(live))
            if live.is_over: break
            press(live, "run")
            await asyncio.sleep(0.02)
        await until(lambda: at_rest(live))
        return live
    live = asyncio.run(main())
    assert live.panel.message.value
    assert [row["step"] for row in lines(live.trainer.run_dir.path)] == [
        *range(1, live.trainer.steps_done + 1)
    ]


def test_watched_values_that_are_not_finite(tmp_path, jupyter):
    "NaN and infinity are drawn as gaps, and logged as null."
    async def main():
        values = iter([float("nan"), float("inf"), -float("inf"), 1e308, -1e308, 0.0])
        live = Live(make("ppo", tmp_path, steps=6), tmp_path / "runs", panels={"odd": ("odd",)},
                    extra_metrics={"odd": lambda t: next(values)})
        live.start()
        await finished(live)
        return live
    live = asyncio.run(main())
    assert outcome(live) == "finished" and [row["odd"]
                                            for row in lines(live.trainer.run_dir.path)][:3] == [None] * 3


# The last step


@pytest.mark.parametrize("steps", [1, 3])
def test_an_error_behind_the_last_step(steps, tmp_path, jupyter):
    "A callback that fails at the very last step leaves no run that is open, locked, and has no button to close it."
    async def main():
        trainer = make("ppo", tmp_path, steps=steps)
        live = Live(trainer, tmp_path / "runs")
        trainer.callbacks.append(once(lambda t, m: m["step"] == steps, fail))
        live.start()
        await finished(live)
        if not live.panel.buttons["run"].disabled:
            press(live, "run")
            await finished(live)
        return live
    live = asyncio.run(main())
    assert outcome(live) == "finished" and (live.trainer.run_dir.path / "model").exists()


def test_interrupt_twice_in_the_last_validation(tmp_path, jupyter):
    "■ twice in the measurement behind the last step: the run can still be ended from its panel."
    async def main():
        trainer = make("pretrain", tmp_path, steps=3)
        cut, evaluate = once(lambda: True, lambda: hit(2)), trainer.evaluate
        trainer.validate = lambda: (cut(), evaluate())[1]
        live = Live(trainer, tmp_path / "runs")
        live.start()
        await finished(live)
        if not live.panel.buttons["run"].disabled:
            press(live, "run")
            await finished(live)
        return live
    assert outcome(asyncio.run(main())) == "finished"


def test_interrupt_twice_while_the_model_is_written(tmp_path, jupyter):
    "■ twice while a finished run writes its model: nobody says that the model is there if it is not."
    async def main():
        trainer = make("ppo", tmp_path, steps=3)
        cut, leave = once(lambda: True, lambda: hit(2)), trainer.finalize
        trainer.finalize = lambda run: (cut(), leave(run))
        live = Live(trainer, tmp_path / "runs")
        live.start()
        await finished(live)
        return live
    live = asyncio.run(main())
    there = (live.trainer.run_dir.path / "model").exists()
    assert there == ("The model is in" in live.panel.message.value) == (outcome(live) == "finished")


def test_a_model_that_cannot_be_written(tmp_path, jupyter):
    "An export that fails can be tried again from the panel."
    async def main():
        trainer = make("ppo", tmp_path, steps=3)
        cut, leave = once(lambda: True, fail), trainer.finalize
        trainer.finalize = lambda run: (cut(), leave(run))
        live = Live(trainer, tmp_path / "runs")
        live.start()
        await finished(live)
        assert "no more" in live.panel.message.value
        live.start()
        await finished(live)
        return live
    live = asyncio.run(main())
    assert outcome(live) == "finished" and (live.trainer.run_dir.path / "model").exists()


def test_resume_at_the_end(tmp_path, jupyter):
    "A finished run that is opened again with resume: latest, as when a notebook is run anew, is finished afterwards, and not locked."
    async def main(trainer):
        live = Live(trainer, tmp_path / "runs")
        live.start()
        await until(lambda: live.is_over and live.task.is_finished)
        return live
    assert outcome(asyncio.run(main(make("ppo", tmp_path, steps=3)))) == "finished"
    live = asyncio.run(main(going_on(make("ppo", tmp_path, steps=3))))
    assert outcome(live) == "finished" and not live.record.is_open


def test_the_last_step_by_hand(tmp_path, jupyter):
    "The last step taken by hand, while the panel is paused: the run can still be ended from its panel."
    async def main():
        live = Live(make("ppo", tmp_path, steps=6), tmp_path / "runs")
        live.start()
        await until(lambda: live.trainer.steps_done >= 2)
        live.pause()
        while not live.is_over: live.trainer.step()
        await until(lambda: at_rest(live))
        live.show()
        if not live.panel.buttons["run"].disabled: press(live, "run")
        await finished(live)
        return live
    assert outcome(asyncio.run(main())) == "finished"


def test_started_when_it_is_over(tmp_path, jupyter):
    "The cell `live.start()` run again after the end shows the panel, and plays nothing."
    async def main():
        live = Live(make("ppo", tmp_path, steps=2), None)
        live.start()
        await finished(live)
        live.start()
        await until(lambda: live.task.is_finished)
        assert not live.playing and live.panel.buttons["run"].description == "Run"
    asyncio.run(main())


def test_a_run_that_would_replace_its_own_beginning(tmp_path, jupyter):
    "A panel refuses, as `sft` does, a run that would replace the model it begins with."
    async def main():
        first = Live(make("sft", tmp_path, steps=2), tmp_path / "runs")
        first.start()
        await finished(first)
        cfg = first.trainer.cfg.model_copy(update={"pretrained_model": str(tmp_path / "runs/sft"),
                                                   "overwrite": True})
        live = Live(SFTTrainer(cfg), tmp_path / "runs")
        with pytest.raises(UserError, match="would replace it"): live.start()
        live.pause()
        await until(lambda: live.task.task is None or at_rest(live))
    asyncio.run(main())


# Stop, and on again


def test_stop_in_the_middle_of_a_step(tmp_path, jupyter):
    "A step cut short between its updates, then Stop: the step is ended and saved, and Run goes on as if nothing had been."
    async def main():
        trainer = make("ppo", tmp_path, steps=6)
        update = trainer._one_update
        cut = once(lambda now: now.number == 3 and len(now.updates) == 2, lambda: hit(2))
        trainer._one_update = lambda now, *args: (update(now, *args), cut(now))
        live = Live(trainer, tmp_path / "runs")
        live.start()
        await until(lambda: trainer.steps_done == 3 and at_rest(live))
        await stopped(live)
        assert (
            outcome(live) == "interrupted"
            and checkpoints(live.trainer.run_dir.path)[-1].name == "step_000004"
        )
        await gone_on(live)
        return live
    live, plain = asyncio.run(main()), make("ppo", tmp_path, steps=6)
    plain.run()
    assert same(live.trainer, plain)
    assert [row["step"] for row in lines(live.trainer.run_dir.path)] == [*range(1, 7)]


@pytest.mark.parametrize("again", ["panel", "kernel"])
def test_a_turn_before_a_failed_step(again, tmp_path, jupyter):
    "A knob turned before a step whose reward fails, then Stop, and on in the panel or in a new kernel: the turn stays in the log."
    broken = []
    def reward(prompt, response): return fail() if broken else count_a(prompt, response)

    async def begin():
        live = Live(make("ppo", tmp_path, steps=6, reward=reward), tmp_path / "runs")
        def turn(trainer, metrics):
            if metrics["step"] == 3: broken.append(1); live.panel.sliders["kl_coef"].value = 0.4
        live.trainer.callbacks.append(turn)
        live.start()
        await until(lambda: broken and at_rest(live))
        broken.clear()
        live.stop()
        if again == "panel":
            live.trainer.callbacks.remove(turn)
            press(live, "run")
            await finished(live)
        return live

    async def go_on():
        live = Live(going_on(make("ppo", tmp_path, steps=6)), tmp_path / "runs")
        live.start()
        await finished(live)
        return live
    live = asyncio.run(begin())
    if again == "kernel": live = asyncio.run(go_on())
    assert events(live.trainer.run_dir.path) == [(3, "kl_coef", 0.4)]
    replayed = make("ppo", tmp_path, steps=6)
    replay_knobs(replayed, live.trainer.run_dir.path)
    replayed.run()
    assert same(replayed, live.trainer)


def test_a_step_by_hand_after_stop(tmp_path, jupyter):
    "Steps by hand after Stop, then Run: they, and the knobs turned for them, stand in the log of the run that is gone on with."
    async def main():
        live = Live(make("ppo", tmp_path, steps=8), tmp_path / "runs")
        live.start()
        await until(lambda: live.trainer.steps_done >= 3)
        live.stop()
        at = live.trainer.steps_done
        live.trainer.knobs.kl_coef = 0.4
        live.trainer.step()
        await gone_on(live)
        return at, live
    at, live = asyncio.run(main())
    assert events(live.trainer.run_dir.path) == [(at, "kl_coef", 0.4)]
    assert [row["step"] for row in lines(live.trainer.run_dir.path)] == [*range(1, 9)]


@pytest.mark.parametrize("stage", ["ppo", "pretrain"])
def test_a_step_by_hand_before_start(stage, tmp_path, jupyter):
    "A few steps by hand, to look around, and then a panel: it starts, and what follows is recorded, also after Stop and Run."
    async def main():
        trainer = make(stage, tmp_path, steps=12)
        trainer.step(); trainer.step()
        live = Live(trainer, tmp_path / "runs")
        # pretraining has logged nothing by then
        trainer.callbacks.append(once(lambda t, m: m["step"] == 5, live.stop))
        live.start()
        await until(lambda: trainer.steps_done == 5 and at_rest(live))
        await gone_on(live)
        return live
    live = asyncio.run(main())
    assert outcome(live) == "finished"
    if stage == "ppo": assert [row["step"] for row in lines(live.trainer.run_dir.path)] == [*range(3, 13)]


def test_stop_of_a_run_that_would_replace_another(tmp_path, jupyter):
    "With overwrite: true, stopped before its first checkpoint and gone on with, a run has all its lines in the end."
    async def main():
        Live(make("ppo", tmp_path, steps=2), tmp_path / "runs").run()
        trainer = make("ppo", tmp_path, steps=8)
        trainer.cfg = trainer.cfg.model_copy(update={"overwrite": True})
        live = Live(trainer, tmp_path / "runs")
        live.start()
        await until(lambda: trainer.steps_done >= 3)
        await stopped(live)
        await gone_on(live)
        return live
    live = asyncio.run(main())
    assert [row["step"] for row in lines(live.trainer.run_dir.path)] == [*range(1, 9)]


@pytest.mark.parametrize("seed", range(3))
def test_any_order(seed, tmp_path, jupyter):
    "Whatever is pressed in whatever order, with ■ between: the weights and the log are those of an undisturbed run."
    rng = np.random.default_rng(seed)

    async def main():
        live = Live(make("ppo", tmp_path, steps=15), tmp_path / "runs")
        live.start()
        while not live.is_over:
            match rng.choice(["run", "step", "stop", "sample", "save", "hit", "pause", "hand", "start"]):
                case "hit": hit() if live.playing and signal.getsignal(signal.SIGINT) not in (signal.SIG_IGN, None) else None
                case "pause": live.pause()
                case "start": live.start()
                case "hand":
                    live.pause()
                    if live.record.is_open and live.trainer.steps_done < 14: live.trainer.step()
                case name: press(live, name)
            await asyncio.sleep(float(rng.random() * 0.04))
        await finished(live)
        return live
    live, plain = asyncio.run(main()), make("ppo", tmp_path, steps=15)
    plain.run()
    assert same(live.trainer,
                plain) and [row["step"] for row in lines(live.trainer.run_dir.path)] == [*range(1, 16)]
    assert outcome(live) == "finished"


def test_a_callback_that_stops(tmp_path, jupyter):
    "A callback may pause or stop its own panel; the step it looks at stands in the log, and Run goes on."
    async def main():
        live = Live(make("ppo", tmp_path, steps=8), tmp_path / "runs")
        live.trainer.callbacks += [once(lambda t, m: m["step"] == 2, live.pause),
                                   once(lambda t, m: m["step"] == 5, live.stop)]
        live.start()
        for at in (2, 5):
            await until(lambda at=at: live.trainer.steps_done == at and at_rest(live))
            press(live, "run")
        await finished(live)
        return live
    live, plain = asyncio.run(main()), make("ppo", tmp_path, steps=8)
    plain.run()
    assert same(live.trainer,
                plain) and [row["step"] for row in lines(live.trainer.run_dir.path)] == [*range(1, 9)]


def test_stop_requested(tmp_path, jupyter):
    "A callback that sets `stop_requested`, as early stopping does for `Trainer.run`, stops a panel too."
    async def main():
        live = Live(make("ppo", tmp_path, steps=8), tmp_path / "runs")
        live.trainer.callbacks.append(lambda t, m: setattr(t, "stop_requested", m["step"] == 3))
        live.start()
        await until(lambda: at_rest(live))
        return live
    assert asyncio.run(main()).trainer.steps_done == 3


def test_a_run_directory_that_vanishes(tmp_path, jupyter):
    "A run directory deleted while it trains is a sentence in the panel."
    async def main():
        live = Live(make("ppo", tmp_path, steps=8), tmp_path / "runs")
        live.trainer.callbacks.append(once(lambda t, m: m["step"] == 2,
                                           lambda: os.rename(tmp_path / "runs/ppo", tmp_path / "away")))
        live.start()
        await until(lambda: at_rest(live))
        assert "could not be written" in live.panel.message.value
        with pytest.raises(UserError, match="log.txt could not be written"): live.stop()
        return live
    live = asyncio.run(main())
    assert (
        not live.record.is_open
        and checkpoints(live.trainer.run_dir.path)
        and _writer(live.trainer.run_dir.path) is None
    )


# Several panels


def test_an_old_panel_stays_off(tmp_path, jupyter):
    "The panel that another one has taken over offers no buttons, also after its task has ended."
    async def main():
        first = Live(make("ppo", tmp_path, steps=6), tmp_path / "runs")
        first.start()
        await until(lambda: first.trainer.steps_done >= 2)
        second = Live(first.trainer, tmp_path / "runs")
        second.start()
        await until(lambda: at_rest(first))
        assert first.panel.buttons["run"].disabled
        await finished(second)
    asyncio.run(main())


def test_an_old_panel_is_started_again(tmp_path, jupyter):
    "The cell of the old panel run again, `old.start()`, loses no line of the run that another panel has taken over."
    async def main():
        first = Live(make("ppo", tmp_path, steps=15), tmp_path / "runs")
        first.start()
        await until(lambda: first.trainer.steps_done >= 2)
        second = Live(first.trainer, tmp_path / "runs")
        second.start()
        with pytest.raises(UserError, match="another panel shows"): first.start()
        await finished(second)
        return second
    second = asyncio.run(main())
    assert [row["step"] for row in lines(second.trainer.run_dir.path)] == [*range(1, 16)] and outcome(
        second
    ) == "finished"


def test_run_pauses_the_other(tmp_path, jupyter):
    "The button Run pauses another training, as `start` does."
    async def main():
        first, second = (Live(make("ppo", tmp_path, name, steps=10**6), None) for name in ("one", "two"))
        first.start()
        await until(lambda: first.trainer.steps_done >= 1)
        second.start()
        await until(lambda: second.trainer.steps_done >= 1)
        press(first, "run")
        await asyncio.sleep(0.05)
        playing = [first.playing, second.playing]
        first.pause(); second.pause()
        await until(lambda: at_rest(first) and at_rest(second))
        assert playing == [True, False]
    asyncio.run(main())


def test_a_forgotten_trainer_is_freed(tmp_path, jupyter):
    "A notebook that makes trainer and panel anew does not keep the weights of the old ones."
    async def main():
        first = Live(make("ppo", tmp_path, "one", steps=2), None)
        first.start()
        await finished(first)
        gone = weakref.ref(first.trainer)
        del first
        second = Live(make("ppo", tmp_path, "two", steps=2), None)
        second.start()
        await finished(second)
        gc.collect()
        assert gone() is None
    asyncio.run(main())


def test_a_forgotten_run(tmp_path, jupyter, recwarn):
    "A panel that is paused and then forgotten leaves a run that is interrupted and not locked, and says nothing more."
    async def main():
        held = [Live(make("ppo", tmp_path, "one", steps=50), tmp_path / "runs")]
        held[0].start()
        await until(lambda: held[0].trainer.steps_done >= 2)
        held[0].pause()
        await until(lambda: at_rest(held[0]))
        run = held[0].trainer.run_dir.path
        assert read_metadata(run)["outcome"] == "running"
        held.clear()
        second = Live(make("ppo", tmp_path, "two", steps=2), None)
        second.start()
        await finished(second)
        gc.collect()
        return run
    run = asyncio.run(main())
    assert read_metadata(run)["outcome"] == "interrupted" and _writer(run) is None
    assert not [w for w in recwarn if "ignored" in str(w.message)]


def test_a_trainer_made_anew(tmp_path, jupyter):
    "The cell that makes trainer and panel run again while the first one trains: the second has the run to itself."
    async def main():
        first = Live(make("ppo", tmp_path, steps=50), tmp_path / "runs")
        first.start()
        await until(lambda: first.trainer.steps_done >= 2)
        second = Live(make("ppo", tmp_path, steps=6), tmp_path / "runs")
        second.start()
        await finished(second)
        press(first, "run")
        await until(lambda: at_rest(first))
        assert "newer run" in first.panel.message.value
        return second
    live = asyncio.run(main())
    assert [row["step"] for row in lines(live.trainer.run_dir.path)] == [*range(1, 7)] and outcome(
        live
    ) == "finished"


# ■


def test_no_handler_stays_behind(tmp_path, jupyter):
    "A training that ends while another cell awaits something leaves no handler of ■ behind, and the next training hears ■."
    async def main():
        first = Live(make("ppo", tmp_path, "one", steps=8), None)
        first.start()
        await until(lambda: first.trainer.steps_done >= 2)
        # a cell begins, as the kernel has it …
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        await finished(first)
        signal.signal(signal.SIGINT, before)                              # … and ends
        second = Live(make("ppo", tmp_path, "two", steps=25), None)
        second.start()
        await until(lambda: second.trainer.steps_done >= 2)
        hit()
        await until(lambda: at_rest(second))
        stopped = second.trainer.steps_done
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        assert stopped < 25
    asyncio.run(main())


def test_interrupt_twice_in_a_sample(tmp_path, jupyter):
    "A sample that takes for ever can be left by ■."
    async def main():
        live = Live(make("ppo", tmp_path, steps=4), None)
        def samples():
            hit(3)
            reached.append(1)
            return []
        reached, live.trainer.samples = [], samples
        live.start()
        press(live, "sample")
        await until(lambda: at_rest(live))
        return reached
    assert not asyncio.run(main())


def test_wait_in_a_cell_and_interrupt(tmp_path, jupyter):
    "`wait` trains to the end, and pauses at ■; the handler is the one of before."
    async def main():
        live = Live(make("ppo", tmp_path, steps=8), tmp_path / "runs")
        live.trainer.callbacks.append(once(lambda t, m: m["step"] == 3, hit))
        live.start()
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        assert not live.wait() and live.trainer.steps_done == 3
        live.start()
        assert live.wait()
        assert signal.signal(signal.SIGINT, before) == signal.default_int_handler
        await finished(live)
        return live
    assert outcome(asyncio.run(main())) == "finished"


@pytest.mark.parametrize("hours", [-1, 0, 1])
def test_clocks_of_browser_and_kernel(hours, tmp_path, jupyter, monkeypatch):
    "Which cells were sent together is told by one clock, the browser's, which may go wrong by an hour."
    now = lambda: datetime.now(UTC) + timedelta(hours=hours)
    header = {"date": now()}
    shell = SimpleNamespace(ast_transformers=[],
                            kernel=SimpleNamespace(get_parent=lambda channel="shell": {"header": header}))
    monkeypatch.setattr(lab, "get_ipython", lambda: shell)

    async def main():
        live = Live(make("ppo", tmp_path, steps=12), None)
        waited, live.wait = [], lambda: waited.append(1) or True
        live.start()
        transformer = shell.ast_transformers[-1]
        transformer.visit(None)                                           # sent with the first cell
        assert waited == [1]
        header["date"] = now() + timedelta(minutes=5)
        transformer.visit(None)                                           # sent later
        assert waited == [1]
        await finished(live)
    asyncio.run(main())


# Panel


@pytest.mark.parametrize("factor", [0.0, 1e-4, 50.0])
def test_a_slider_tells_the_truth(factor, jupyter):
    "A panel made when a knob stands outside the usual shows where it stands."
    panel = Panel(Knobs(learning_rate_factor=factor), 10, lambda name: None)
    panel.refresh(0, "", False, False)
    assert (
        panel.sliders["learning_rate_factor"].value == pytest.approx(max(factor, 1e-6))
        and panel.knobs.learning_rate_factor == factor
    )


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-9, 1e9])
def test_odd_factors(value, jupyter):
    "A factor that the slider cannot show stays what it is."
    panel = Panel(Knobs(learning_rate_factor=1), 10, lambda name: None)
    panel.knobs.learning_rate_factor = value
    for _ in range(3): panel.refresh(0, "", True, False)
    assert panel.knobs.learning_rate_factor == value
    panel.sliders["learning_rate_factor"].value = 0.5
    assert panel.knobs.learning_rate_factor == 0.5


def test_a_slider_moved_while_the_panel_is_refreshed(jupyter):
    "Moved on another thread all the time, a slider has the last word."
    panel, stop = Panel(Knobs(kl_coef=0.1), 10, lambda name: None), []
    def move():
        for i in range(300): panel.sliders["kl_coef"].value = 0.001 * (i + 1)
        stop.append(1)
    thread = threading.Thread(target=move)
    thread.start()
    while not stop: panel.refresh(0, "", True, False)
    thread.join()
    panel.refresh(0, "", True, False)
    assert panel.knobs.kl_coef == panel.sliders["kl_coef"].value == pytest.approx(0.3)


def test_a_plain_trainer(jupyter):
    "A trainer without a stage trains in a panel; a sample it has not is a sentence, and does not pause."
    trainer = Trainer(nn.Linear(2, 1), lambda model, x: (mx.square(model(x)).sum(), mx.array(x.shape[0])),
                      lambda step: mx.ones((4, 2)), 50)

    async def main():
        live = Live(trainer)
        live.start()
        await until(lambda: trainer.steps_done >= 2)
        press(live, "sample"); press(live, "save")
        await finished(live)
        return live
    assert "AttributeError" not in asyncio.run(main()).panel.message.value


def test_texts_are_texts(jupyter):
    "Neither markup nor formulas get into samples and messages."
    table = samples_table([("<b>$x$</b>", "</code><script>$y$", 1.0)], "after")
    assert "<b>" not in table and "<script>" not in table
    panel = Panel(Knobs(a=1), 1, lambda name: None)
    panel.show_message("</code><script>$x$")
    assert "<script>" not in panel.message.value


def test_an_error_of_the_last_piece_is_told(tmp_path, jupyter):
    "Stop while a step is under way, whose reward then fails: the reward's sentence is not lost."
    async def main():
        live = Live(make("ppo", tmp_path, steps=6, reward=lambda p, r: fail() if broken else count_a(p, r)),
                    tmp_path / "runs")
        live.start()
        await until(lambda: live.trainer.steps_done >= 2)
        live.pause()
        live._pieces = live.trainer.stepping()                            # suspended at its beginning
        broken.append(1)
        live.stop()
        await until(lambda: at_rest(live))
        return live
    broken = []
    assert "no more" in asyncio.run(main()).panel.message.value


def test_an_old_sentence_goes(tmp_path, jupyter):
    "An error's sentence does not stand in a panel whose training goes on well."
    async def main():
        broken = [1]
        live = Live(make("ppo", tmp_path, steps=6, reward=lambda p, r: fail() if broken else count_a(p, r)),
                    None)
        live.start()
        await until(lambda: at_rest(live))
        broken.clear()
        await gone_on(live)
        return live
    assert "no more" not in asyncio.run(main()).panel.message.value


def test_a_formula_in_a_title(tmp_path, jupyter):
    "A dollar in a title or a metric's name is a dollar."
    async def main():
        live = Live(make("ppo", tmp_path, steps=3), None, panels={"price in $ of _ $": ("reward",)})
        live.start()
        await until(lambda: at_rest(live))
        return live
    assert asyncio.run(main()).is_over


# What a second reader found


def test_an_impatient_second_click(tmp_path, jupyter):
    "Pause pressed in the middle of a long step changes the button at once, and whoever presses the old one again has not pressed Run."
    async def main():
        live = Live(make("ppo", tmp_path, steps=50), None)
        live.start()
        await until(lambda: live.trainer.steps_done >= 2 and live._pieces)
        press(live, "run")
        assert not live.playing and live.panel.buttons["run"].description == "Run"
        live.playing = False  # as after ■, before the step has ended
        live.panel.buttons["run"].description = "Pause"
        press(live, "run")
        assert not live.playing
        await until(lambda: at_rest(live))
    asyncio.run(main())


@pytest.mark.parametrize("saved", [False, True])
def test_a_save_at_stop_that_fails(saved, tmp_path, jupyter, monkeypatch):
    "A disk that is full at Stop, and then is not: no line and no turn of a knob is lost, with an older checkpoint or without one."
    async def main():
        live = Live(make("ppo", tmp_path, steps=8), tmp_path / "runs")
        live.start()
        await until(lambda: live.trainer.steps_done >= 2)
        live.pause()
        if saved: live._perform("save")
        live.trainer.knobs.kl_coef = 0.4
        at = live.trainer.steps_done
        for _ in range(2): live.trainer.step()
        with monkeypatch.context() as patch:
            patch.setattr("mlx_pretrain.run.write_checkpoint", lambda *args: fail())
            with pytest.raises(ValueError): live.stop()
        await gone_on(live)
        return at, live
    at, live = asyncio.run(main())
    assert [row["step"] for row in lines(live.trainer.run_dir.path)] == [*range(1, 9)]
    assert events(live.trainer.run_dir.path) == [(at, "kl_coef", 0.4)] and outcome(live) == "finished"


def test_interrupt_while_stop_saves(tmp_path, jupyter, monkeypatch):
    "■ while Stop saves: nobody says that it is saved, and it can be saved again."
    async def main():
        live = Live(make("ppo", tmp_path, steps=50), tmp_path / "runs")
        live.start()
        await until(lambda: live.trainer.steps_done >= 2)
        cut, write = once(lambda: True, lambda: hit(2)), run.write_checkpoint
        monkeypatch.setattr("mlx_pretrain.run.write_checkpoint", lambda *args: (cut(), write(*args))[1])
        await stopped(live)
        assert not checkpoints(live.trainer.run_dir.path) and "saved" not in live.panel.message.value
        press(live, "run")
        await until(lambda: live.trainer.steps_done >= 8)
        await stopped(live)
        return live
    live = asyncio.run(main())
    assert "saved" in live.panel.message.value and checkpoints(live.trainer.run_dir.path)
    assert [row["step"] for row in lines(live.trainer.run_dir.path)] == [
        *range(1, live.trainer.steps_done + 1)
    ]


def test_first_without_a_run_directory(tmp_path, jupyter):
    "A panel without a run directory, then one with: the second records, from there on."
    async def main():
        first = Live(make("ppo", tmp_path, steps=8), None)
        first.start()
        await until(lambda: first.trainer.steps_done >= 2)
        second = Live(first.trainer, tmp_path / "runs")
        at = first.trainer.steps_done
        second.start()
        await finished(second)
        return at, second
    at, live = asyncio.run(main())
    assert outcome(live) == "finished" and [row["step"] for row in lines(live.trainer.run_dir.path)] == [
        *range(at + 1, 9)
    ]


def test_a_turn_that_saved_a_run_is_replayed(tmp_path, jupyter):
    "A training that stops by itself, is helped by a slider, and goes on: its metrics alone repeat that, to the same weights."
    def wild():
        trainer = make("ppo", tmp_path, steps=40)
        trainer.knobs.learning_rate_factor = 3000.0
        return trainer

    async def main():
        live = Live(wild(), tmp_path / "runs")
        live.start()
        await until(lambda: at_rest(live))
        assert (
            not live.is_over
            and "border-left" in live.panel.message.value
            and "learning_rate" in live.panel.message.value
        )
        live.panel.sliders["learning_rate_factor"].value = 0.1
        press(live, "run")
        await until(lambda: at_rest(live) or live.trainer.steps_done >= 35)
        live.pause()
        return live
    live = asyncio.run(main())
    again = make("ppo", tmp_path, steps=40)
    replay_knobs(again, live.trainer.run_dir.path)
    while again.steps_done < live.trainer.steps_done:
        try: again.step()
        except TrainingError: pass
    assert same(again, live.trainer) and len(events(live.trainer.run_dir.path)) == 2


def test_all_is_saved_means_all(tmp_path, jupyter):
    "Save after steps by hand, behind a Stop, saves them; Save before the first Run has a run directory to save in."
    async def main():
        live = Live(make("ppo", tmp_path, steps=20), tmp_path / "runs")
        live.show()
        press(live, "save")
        await until(lambda: "Saved in" in live.panel.message.value)
        press(live, "run")
        await until(lambda: live.trainer.steps_done >= 2)
        live.stop()
        for _ in range(3): live.trainer.step()
        press(live, "save")
        await until(lambda: "Saved in" in live.panel.message.value)
        assert checkpoints(live.trainer.run_dir.path)[-1].name == f"step_{live.trainer.steps_done:06d}"
        live.trainer.step()
        live.stop()
        assert checkpoints(live.trainer.run_dir.path)[-1].name == f"step_{live.trainer.steps_done:06d}"
    asyncio.run(main())


def test_a_turn_before_there_was_a_panel(tmp_path, jupyter):
    "A knob turned for a step by hand, before panel and run directory, stands in the log all the same."
    async def main():
        trainer = make("ppo", tmp_path, steps=6)
        trainer.knobs.kl_coef = 0.4
        trainer.step()
        live = Live(trainer, tmp_path / "runs")
        live.start()
        await finished(live)
        return live
    live, again = asyncio.run(main()), make("ppo", tmp_path, steps=6)
    assert events(live.trainer.run_dir.path) == [(0, "kl_coef", 0.4)]
    replay_knobs(again, live.trainer.run_dir.path)
    again.run()
    assert same(again, live.trainer)


def test_warnings_of_the_end_are_seen(tmp_path, jupyter):
    "What the end of a run warns of stands beside the sentence that it is finished."
    async def main():
        trainer = make("pretrain", tmp_path, steps=4)
        trainer.validation_interval, values = 2, iter([1.0, 2.0])
        trainer.validate = lambda: {"val_loss": next(values)}
        live = Live(trainer, tmp_path / "runs")
        live.start()
        await finished(live)
        return live
    said = asyncio.run(main()).panel.message.value
    assert "Validation was best at step 2" in said and "Finished" in said


def test_a_refused_start_disturbs_nobody(tmp_path, jupyter):
    "A training whose run directory cannot be used does not pause the one that runs."
    async def main():
        Live(make("ppo", tmp_path, "taken", steps=2), tmp_path / "runs").run()
        first = Live(make("ppo", tmp_path, "one", steps=10**6), None)
        first.start()
        await until(lambda: first.trainer.steps_done >= 1)
        with pytest.raises(UserError, match="exists already"):
            Live(make("ppo", tmp_path, "taken", steps=2), tmp_path / "runs").start()
        playing = first.playing
        first.pause()
        await until(lambda: at_rest(first))
        assert playing
    asyncio.run(main())


def test_a_pause_is_no_training(tmp_path, jupyter):
    "The seconds that a run took are those in which it trained, without those in which it was paused."
    async def main():
        live, began = Live(make("ppo", tmp_path, steps=6), tmp_path / "runs"), time.perf_counter()
        live.start()
        await until(lambda: live.trainer.steps_done >= 2)
        live.pause()
        await asyncio.sleep(1)
        await gone_on(live)
        return live, time.perf_counter() - began
    live, passed = asyncio.run(main())
    assert 0 < read_metadata(live.trainer.run_dir.path)["took"]["seconds"] <= passed - 1


def test_silent_requests_do_not_wait(tmp_path, jupyter, monkeypatch):
    "A request that a front end makes for itself, such as for its list of variables, is no cell."
    parent = {"header": {"date": datetime.now(UTC)}, "content": {"silent": False}}
    shell = SimpleNamespace(ast_transformers=[],
                            kernel=SimpleNamespace(get_parent=lambda channel="shell": parent))
    monkeypatch.setattr(lab, "get_ipython", lambda: shell)

    async def main():
        live = Live(make("ppo", tmp_path, steps=12), None)
        waited, live.wait = [], lambda: waited.append(1) or True
        live.start()
        parent["content"]["silent"] = True
        shell.ast_transformers[-1].visit(None)
        assert not waited
        parent["content"]["silent"] = False
        shell.ast_transformers[-1].visit(None)
        assert waited
        await finished(live)
    asyncio.run(main())


def test_nothing_keeps_what_is_over(tmp_path, jupyter, monkeypatch):
    "When a training is over, deleting panel and trainer frees the weights, though the shell goes on."
    shell = SimpleNamespace(ast_transformers=[],
                            kernel=SimpleNamespace(get_parent=lambda channel="shell": {}))
    monkeypatch.setattr(lab, "get_ipython", lambda: shell)

    async def main():
        held = [Live(make("ppo", tmp_path, steps=2), None)]
        held[0].start()
        await until(lambda: held[0].is_over and at_rest(held[0]))
        gone = weakref.ref(held.pop().trainer)
        await asyncio.sleep(0)
        gc.collect()
        assert gone() is None
    asyncio.run(main())


# Playground


def ground(tmp_path, rows, pretrained=None, **data):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    cfg = {"data": {"input_file": str(file), "preprocessing": {"max_context_size": 64}, **data},
           "model": {"dimensions": {"hidden_size": 32, "num_layers": 1}, "attention": {"num_heads": 2}},
           "training": {"hyperparameters": {"iters": 1, "batch_size": 1}}}
    return Playground(SFTConfig.model_validate_json(json.dumps(cfg)), pretrained)


def shown(play):
    "The tokens of the first row, and which are trained, as the playground has them."
    fmt = play.start.model_copy(update=play.formats)
    example, cut, _ = tokenize_row(play.rows[0], fmt, play.tokenizer, play.cfg)
    kept = [n for n in range(len(example.ids)) if n not in cut]
    return [example.ids[n] for n in kept], [example.loss_mask[n] for n in kept]


def taken(play):
    "And as a trainer has them."
    ids, mask = SFTTrainer(play.config(), play.pretrained).data[0]
    return [*map(int, ids)], [*map(bool, mask)]


TALK = {"messages": [{"role": "user", "content": "say a"}, {"role": "assistant", "content": "a"}]}
FORMS = {"messages": TALK, "text": {"text": "the cat sat"}, "verbatim": {"prompt": "2+2=", "completion": "4"},
         "pair": {"instruction": "say a", "response": "a"}, "output": {"instruction": "say a", "output": "a"}}


@pytest.mark.parametrize("mask_prompt", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_the_same_tokens(form, mask_prompt, tmp_path):
    "Rows of every form: the playground shows the tokens and the mask that a trainer takes."
    play = ground(tmp_path, [FORMS[form]], mask_prompt=mask_prompt)
    assert "border-left" not in play.view.value
    assert shown(play) == taken(play)


@pytest.mark.parametrize("form", ["messages", "pair"])
@pytest.mark.parametrize("edit", [False, True])
def test_the_same_tokens_in_a_chat_template(form, edit, tmp_path):
    "With the chat template of a pretrained model, formats handed to a trainer are taken, and give the same tokens."
    play = ground(tmp_path, [FORMS[form]], chatty())
    if edit: play.texts["system_prompt"].value = "be brief"
    assert "border-left" not in play.view.value
    assert shown(play) == taken(play)


def chatty(system=None, fmt=None):
    "A pretrained model with a chat template."
    tok = tokenizer("bytes")
    args = LlamaArgs(vocab_size=tok.vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                     num_attention_heads=2, num_key_value_heads=2, head_dim=16, max_position_embeddings=64)
    class Chatty(type(tok)):
        chat_template = ("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
                         "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}")
    made = Chatty()
    return Pretrained(Llama(args, 0), made, Path("chatty"),
                      fmt or PromptFormat(prompt_format=None, system_prompt=system))


@pytest.mark.parametrize("form", ["messages", "pair"])
def test_an_inherited_system_prompt_is_cleared(form, tmp_path):
    "A system prompt of the pretrained model, cleared in the playground, is gone in the trainer too."
    play = ground(tmp_path, [FORMS[form]], chatty(fmt=PromptFormat(system_prompt="SYSTEM")))
    assert "S" in map(play.tokenizer.piece, shown(play)[0])
    play.texts["system_prompt"].value = ""
    assert "Y" not in map(play.tokenizer.piece, shown(play)[0]) and shown(play) == taken(play)


def test_what_the_model_reads_at_most(tmp_path):
    "A row that is longer than the model reads is not said to fit."
    play = ground(tmp_path, [{"instruction": "x" * 80, "response": "y"}, FORMS["pair"]],
                  chatty(fmt=PromptFormat()), preprocessing={})
    assert "there is room" not in play.view.value


def test_the_answer_in_the_prompt(tmp_path):
    "A prompt that holds the column of the response is refused, as a trainer does."
    play = ground(tmp_path, [FORMS["output"]])
    play.texts["prompt_format"].value = "{instruction} {output}"
    assert "border-left" in play.view.value
    with pytest.raises(ConfigError, match="response"): SFTTrainer(play.config())


def test_a_long_prompt_that_is_trained(tmp_path):
    "With mask_prompt: false, a prompt that leaves no room is what a trainer says it is."
    play = ground(tmp_path, [{"instruction": "x" * 90, "response": "y"}], mask_prompt=False)
    with pytest.raises(UserError, match="the prompt has"): SFTTrainer(play.config())
    assert "the prompt has" in play.view.value


def test_a_huge_row(tmp_path):
    "A row of a hundred thousand characters does not make a page of many megabytes."
    play = ground(tmp_path, [{"instruction": "x", "response": "y" * 10**5}])
    assert len(play.view.value) < 2 * 10**6


@pytest.mark.parametrize("rows", [[], ["\n\n"], ["no json\n"], [{"a": 1}]])
@pytest.mark.parametrize("how", ["error", "skip"])
def test_nothing_to_show(rows, how, tmp_path):
    "A file without a row that can be used is one sentence."
    with pytest.raises(UserError): ground(tmp_path, rows, on_bad_row=how)


def test_bad_rows_between(tmp_path):
    "Bad rows are left out with skip; one that only lacks a column is shown with its sentence, and the line is the file's."
    play = ground(tmp_path, ["broken\n", FORMS["pair"], "[1]\n", {"instruction": "only"}, FORMS["pair"]],
                  on_bad_row="skip")
    assert [row.line for row in play.rows] == [2, 4, 5]
    play.row.value = 2
    assert "line 4" in play.view.value and "border-left" in play.view.value
    play.row.value = 99
    assert "line 5" in play.view.value and "border-left" not in play.view.value


@pytest.mark.parametrize("text", ["{", "}", "{instruction", "{}", "{0}", "{instruction!r}", "{a.b}", "{nobody}", "", "{response}", "{{}}"])
@pytest.mark.parametrize("key", ["prompt_format", "response_format"])
def test_broken_braces(key, text, tmp_path):
    "Whatever stands in a format, it is a sentence or tokens, and a trainer says the same."
    play = ground(tmp_path, [FORMS["pair"]])
    play.texts[key].value = text
    bad = "border-left" in play.view.value
    try: taken(play)
    except UserError: assert bad
    else: assert not bad and shown(play) == taken(play)


def test_markup_in_a_row(tmp_path):
    "Text of rows, formats and file names stays text, and a dollar outside code would be a formula."
    folder = tmp_path / "a$b$<b>"
    folder.mkdir()
    play = ground(folder, [{"instruction": "<script>$x$", "response": "</code><b>"}])
    assert "<script>" not in play.view.value and "<b>" not in play.view.value
    assert "$" not in re.sub(r"<code.*?</code>", "", play.view.value, flags=re.S)


def test_edits_on_another_thread(tmp_path):
    "Formats edited on another thread end as they were written last."
    play = ground(tmp_path, [FORMS["pair"]])
    def edit():
        for n in range(20): play.texts["prompt_format"].value = f"{n} {{instruction}}"
    thread = threading.Thread(target=edit)
    thread.start(); thread.join()
    assert play.formats["prompt_format"] == "19 {instruction}" and "19 {instruction}" in play.view.value
