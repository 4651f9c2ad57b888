"The live panel under faults: errors, interrupts and Stop at bad moments, resumed runs; and the playground."
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
from test_lab import (
    at_rest, count_a, in_event_loop, lines, logged_steps, make, press, reach, same, until)

from mlx_pretrain import lab, run
from mlx_pretrain.config import ConfigError, UserError
from mlx_pretrain.lab import Live, Panel, samples_table
from mlx_pretrain.model import Llama, LlamaArgs
from mlx_pretrain.playground import Playground, tokenize_row
from mlx_pretrain.pretrained import Pretrained
from mlx_pretrain.prompt import PromptFormat
from mlx_pretrain.run import lock_holder, checkpoints, read_metadata, read_metrics
from mlx_pretrain.sft import SFTConfig, SFTTrainer
from mlx_pretrain.trainer import Knobs, Trainer, TrainingError, replay_knobs

jupyter = test_lab.jupyter


def events(run):
    return [(row["step"], row["name"], row["value"])
            for row in read_metrics(run) if row.get("event") == "knob"]
def outcome(live): return read_metadata(live.trainer.run_dir.path)["outcome"]
def interrupt(times=1): [os.kill(os.getpid(), signal.SIGINT) for _ in range(times)]


def configured_to_resume(trainer, **changes):
    "The trainer, configured to resume its run."
    resume = trainer.cfg.resume.model_copy(update={"checkpoint": "latest"})
    trainer.cfg = trainer.cfg.model_copy(update={"resume": resume, **changes})
    return trainer


def once(condition, action):
    "A callback that acts the first time that a condition holds."
    done = []
    def call(*args):
        if done or not condition(*args): return
        done.append(1)
        action()
    return call


def fail(): raise ValueError("no more")


async def finished(live): await until(lambda: live.is_over and at_rest(live))


async def stop_and_wait(live):
    press(live, "stop")
    await until(lambda: at_rest(live) and not live._actions)


async def resume_to_end(live):
    press(live, "run")
    await finished(live)


# Counted steps are logged


@pytest.mark.parametrize("times", [1, 2])
@in_event_loop
async def test_interrupt_in_callback_logs_step(times, tmp_path, jupyter):
    "An interrupt, once or twice, while callbacks run: the step is counted, so it is logged."
    trainer = make("ppo", tmp_path, steps=6)
    live = Live(trainer, tmp_path / "runs")
    live.start()
    trainer.callbacks.insert(1, once(lambda t, m: m["step"] == 3, lambda: interrupt(times)))
    await reach(live, 3, paused=True)
    await resume_to_end(live)
    assert logged_steps(live) == [*range(1, 7)]
    assert [*live.curves["reward"][0]] == [*range(1, 7)]


@in_event_loop
async def test_double_interrupt_in_validation_keeps_step(tmp_path, jupyter):
    "Interrupted twice during validation: the validation is lost, the step is not, and training resumes."
    trainer = make("pretrain", tmp_path, steps=6)
    trainer.validation_interval, evaluate = 3, trainer.evaluate
    cut = once(lambda: trainer.steps_done == 3, lambda: interrupt(2))
    trainer.evaluate = lambda: (cut(), evaluate())[1]
    live = Live(trainer, tmp_path / "runs")
    live.start()
    await reach(live, 3, paused=True)
    await resume_to_end(live)
    assert [*live.curves["loss"][0]] == [*range(1, 7)] and [*live.curves["val_loss"][0]] == [6]
    assert logged_steps(live) == [1, 6] and outcome(live) == "finished"


@in_event_loop
async def test_failing_extra_metric_loses_no_log_line(tmp_path, jupyter):
    "A function of `extra_metrics` that fails once loses no line of the log."
    trainer = make("ppo", tmp_path, steps=6)
    live = Live(trainer, tmp_path / "runs",
                extra_metrics={"drift": lambda t: 1 / 0 if t.steps_done == 3 else 1.0})
    live.start()
    await reach(live, 3, paused=True)
    assert "ZeroDivisionError" in live.panel.message.value
    await resume_to_end(live)
    assert logged_steps(live) == [*range(1, 7)]


@pytest.mark.parametrize("value", [np.ones(2), None, "no number"])
@in_event_loop
async def test_extra_metric_without_a_number_is_reported(value, tmp_path, jupyter):
    "An extra metric that is not a number is reported, and loses no line of the log."
    live = Live(make("ppo", tmp_path, steps=3), tmp_path / "runs", extra_metrics={"odd": lambda t: value})
    live.start()
    for _ in range(3):
        await until(lambda: at_rest(live))
        if live.is_over: break
        press(live, "run")
        await asyncio.sleep(0.02)
    await until(lambda: at_rest(live))
    assert live.panel.message.value
    assert logged_steps(live) == [*range(1, live.trainer.steps_done + 1)]


@in_event_loop
async def test_non_finite_extra_metrics_are_gaps(tmp_path, jupyter):
    "NaN and infinity are drawn as gaps, and logged as null."
    values = iter([float("nan"), float("inf"), -float("inf"), 1e308, -1e308, 0.0])
    live = Live(make("ppo", tmp_path, steps=6), tmp_path / "runs", panels={"odd": ("odd",)},
                extra_metrics={"odd": lambda t: next(values)})
    live.start()
    await finished(live)
    assert outcome(live) == "finished" and [row["odd"]
                                            for row in lines(live.trainer.run_dir.path)][:3] == [None] * 3


# The last step


@pytest.mark.parametrize("steps", [1, 3])
@in_event_loop
async def test_error_after_last_step_leaves_no_open_run(steps, tmp_path, jupyter):
    "A callback that fails in the last step leaves no run open and locked, without a button."
    trainer = make("ppo", tmp_path, steps=steps)
    live = Live(trainer, tmp_path / "runs")
    trainer.callbacks.append(once(lambda t, m: m["step"] == steps, fail))
    live.start()
    await finished(live)
    if not live.panel.buttons["run"].disabled:
        press(live, "run")
        await finished(live)
    assert outcome(live) == "finished" and (live.trainer.run_dir.path / "model").exists()


@in_event_loop
async def test_double_interrupt_in_last_validation(tmp_path, jupyter):
    "Interrupted twice during the last validation: the run can still be finished from its panel."
    trainer = make("pretrain", tmp_path, steps=3)
    cut, evaluate = once(lambda: True, lambda: interrupt(2)), trainer.evaluate
    trainer.evaluate = lambda: (cut(), evaluate())[1]
    live = Live(trainer, tmp_path / "runs")
    live.start()
    await finished(live)
    if not live.panel.buttons["run"].disabled:
        press(live, "run")
        await finished(live)
    assert outcome(live) == "finished"


@in_event_loop
async def test_double_interrupt_while_writing_model(tmp_path, jupyter):
    "Interrupted twice while a finished run writes its model: no message names a missing model."
    trainer = make("ppo", tmp_path, steps=3)
    cut, leave = once(lambda: True, lambda: interrupt(2)), trainer.finalize
    trainer.finalize = lambda run: (cut(), leave(run))
    live = Live(trainer, tmp_path / "runs")
    live.start()
    await finished(live)
    there = (live.trainer.run_dir.path / "model").exists()
    assert there == ("The model is in" in live.panel.message.value) == (outcome(live) == "finished")


@in_event_loop
async def test_failed_export_can_be_retried(tmp_path, jupyter):
    "An export that fails can be tried again from the panel."
    trainer = make("ppo", tmp_path, steps=3)
    cut, leave = once(lambda: True, fail), trainer.finalize
    trainer.finalize = lambda run: (cut(), leave(run))
    live = Live(trainer, tmp_path / "runs")
    live.start()
    await finished(live)
    assert "no more" in live.panel.message.value
    live.start()
    await finished(live)
    assert outcome(live) == "finished" and (live.trainer.run_dir.path / "model").exists()


def test_resuming_a_finished_run(tmp_path, jupyter):
    "A finished run that is opened with resume: latest, as when a notebook is rerun, is finished, not locked."
    async def main(trainer):
        live = Live(trainer, tmp_path / "runs")
        live.start()
        await until(lambda: live.is_over and live.task.is_finished)
        return live
    assert outcome(asyncio.run(main(make("ppo", tmp_path, steps=3)))) == "finished"
    live = asyncio.run(main(configured_to_resume(make("ppo", tmp_path, steps=3))))
    assert outcome(live) == "finished" and not live.record.is_open


@in_event_loop
async def test_last_step_taken_manually(tmp_path, jupyter):
    "The last step is taken manually while the panel is paused: the run can still be finished from its panel."
    live = Live(make("ppo", tmp_path, steps=6), tmp_path / "runs")
    live.start()
    await reach(live, 2)
    live.pause()
    while not live.is_over: live.trainer.step()
    await until(lambda: at_rest(live))
    live.show()
    if not live.panel.buttons["run"].disabled: press(live, "run")
    await finished(live)
    assert outcome(live) == "finished"


@in_event_loop
async def test_start_after_the_end_only_shows(tmp_path, jupyter):
    "`live.start()` after the end shows the panel, and runs nothing."
    live = Live(make("ppo", tmp_path, steps=2), None)
    live.start()
    await finished(live)
    live.start()
    await until(lambda: live.task.is_finished)
    assert not live.playing and live.panel.buttons["run"].description == "Run"


@in_event_loop
async def test_run_cannot_overwrite_its_base_model(tmp_path, jupyter):
    "A panel rejects, as `sft` does, a run that would replace the model it starts from."
    first = Live(make("sft", tmp_path, steps=2), tmp_path / "runs")
    first.start()
    await finished(first)
    cfg = first.trainer.cfg.model_copy(update={"pretrained_model": str(tmp_path / "runs/sft"),
                                               "overwrite": True})
    live = Live(SFTTrainer(cfg), tmp_path / "runs")
    with pytest.raises(UserError, match="would replace it"): live.start()
    live.pause()
    await until(lambda: live.task.task is None or at_rest(live))


# Stop and resume


@in_event_loop
async def test_stop_within_a_step_completes_it(tmp_path, jupyter):
    "A step is interrupted between its updates, then Stop: it is completed and saved; Run resumes exactly."
    trainer = make("ppo", tmp_path, steps=6)
    update = trainer.apply_update
    cut = once(lambda step: step.number == 3 and len(step.updates) == 2, lambda: interrupt(2))
    trainer.apply_update = lambda step, *args: (update(step, *args), cut(step))
    live = Live(trainer, tmp_path / "runs")
    live.start()
    await until(lambda: trainer.steps_done == 3 and at_rest(live))
    await stop_and_wait(live)
    assert (
        outcome(live) == "interrupted"
        and checkpoints(live.trainer.run_dir.path)[-1].name == "step_000004"
    )
    await resume_to_end(live)
    plain = make("ppo", tmp_path, steps=6)
    plain.run()
    assert same(live.trainer, plain)
    assert logged_steps(live) == [*range(1, 7)]


@pytest.mark.parametrize("again", ["panel", "kernel"])
def test_knob_change_before_failed_step_is_logged(again, tmp_path, jupyter):
    "A knob change before a failing step, then Stop, resumed in panel or kernel: it stays logged."
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

    async def resume():
        live = Live(configured_to_resume(make("ppo", tmp_path, steps=6)), tmp_path / "runs")
        live.start()
        await finished(live)
        return live
    live = asyncio.run(begin())
    if again == "kernel": live = asyncio.run(resume())
    assert events(live.trainer.run_dir.path) == [(3, "kl_coef", 0.4)]
    replayed = make("ppo", tmp_path, steps=6)
    replay_knobs(replayed, live.trainer.run_dir.path)
    replayed.run()
    assert same(replayed, live.trainer)


@in_event_loop
async def test_manual_steps_after_stop_are_logged(tmp_path, jupyter):
    "Manual steps after Stop, then Run: they and their knob changes are in the log of the resumed run."
    live = Live(make("ppo", tmp_path, steps=8), tmp_path / "runs")
    live.start()
    await reach(live, 3)
    live.stop()
    at = live.trainer.steps_done
    live.trainer.knobs.kl_coef = 0.4
    live.trainer.step()
    await resume_to_end(live)
    assert events(live.trainer.run_dir.path) == [(at, "kl_coef", 0.4)]
    assert logged_steps(live) == [*range(1, 9)]


@pytest.mark.parametrize("stage", ["ppo", "pretrain"])
@in_event_loop
async def test_manual_steps_before_start(stage, tmp_path, jupyter):
    "A few manual steps, then a panel: it starts, and what follows is recorded, also after Stop and Run."
    trainer = make(stage, tmp_path, steps=12)
    trainer.step(); trainer.step()
    live = Live(trainer, tmp_path / "runs")
    # pretraining has logged nothing by then
    trainer.callbacks.append(once(lambda t, m: m["step"] == 5, live.stop))
    live.start()
    await until(lambda: trainer.steps_done == 5 and at_rest(live))
    await resume_to_end(live)
    assert outcome(live) == "finished"
    if stage == "ppo": assert logged_steps(live) == [*range(3, 13)]


@in_event_loop
async def test_stop_before_first_checkpoint_with_overwrite(tmp_path, jupyter):
    "With overwrite: true, stopped before its first checkpoint and resumed, a run has all its lines."
    Live(make("ppo", tmp_path, steps=2), tmp_path / "runs").run()
    trainer = make("ppo", tmp_path, steps=8)
    trainer.cfg = trainer.cfg.model_copy(update={"overwrite": True})
    live = Live(trainer, tmp_path / "runs")
    live.start()
    await until(lambda: trainer.steps_done >= 3)
    await stop_and_wait(live)
    await resume_to_end(live)
    assert logged_steps(live) == [*range(1, 9)]


@pytest.mark.parametrize("seed", range(3))
@in_event_loop
async def test_random_button_sequences(seed, tmp_path, jupyter):
    "Buttons in random order, with interrupts between: weights and log are those of an undisturbed run."
    rng = np.random.default_rng(seed)
    live = Live(make("ppo", tmp_path, steps=15), tmp_path / "runs")
    live.start()
    while not live.is_over:
        match rng.choice(["run", "step", "stop", "sample", "save", "hit", "pause", "hand", "start"]):
            case "hit":
                is_ignored = signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, None)
                if live.playing and not is_ignored: interrupt()
            case "pause": live.pause()
            case "start": live.start()
            case "hand":
                live.pause()
                if live.record.is_open and live.trainer.steps_done < 14: live.trainer.step()
            case name: press(live, name)
        await asyncio.sleep(float(rng.random() * 0.04))
    await finished(live)
    plain = make("ppo", tmp_path, steps=15)
    plain.run()
    assert same(live.trainer, plain)
    assert logged_steps(live) == [*range(1, 16)]
    assert outcome(live) == "finished"


@in_event_loop
async def test_callback_may_pause_and_stop(tmp_path, jupyter):
    "A callback may pause or stop its own panel; its step is logged, and Run resumes."
    live = Live(make("ppo", tmp_path, steps=8), tmp_path / "runs")
    live.trainer.callbacks += [once(lambda t, m: m["step"] == 2, live.pause),
                               once(lambda t, m: m["step"] == 5, live.stop)]
    live.start()
    for at in (2, 5):
        await until(lambda at=at: live.trainer.steps_done == at and at_rest(live))
        press(live, "run")
    await finished(live)
    plain = make("ppo", tmp_path, steps=8)
    plain.run()
    assert same(live.trainer, plain)
    assert logged_steps(live) == [*range(1, 9)]


@in_event_loop
async def test_stop_requested_by_callback(tmp_path, jupyter):
    "A callback that sets `stop_requested`, as early stopping does for `Trainer.run`, stops a panel too."
    live = Live(make("ppo", tmp_path, steps=8), tmp_path / "runs")
    live.trainer.callbacks.append(lambda t, m: setattr(t, "stop_requested", m["step"] == 3))
    live.start()
    await until(lambda: at_rest(live))
    assert live.trainer.steps_done == 3


@in_event_loop
async def test_deleted_run_directory_is_reported(tmp_path, jupyter):
    "A run directory that is deleted during training is reported in the panel."
    live = Live(make("ppo", tmp_path, steps=8), tmp_path / "runs")
    live.trainer.callbacks.append(once(lambda t, m: m["step"] == 2,
                                       lambda: os.rename(tmp_path / "runs/ppo", tmp_path / "away")))
    live.start()
    await until(lambda: at_rest(live))
    assert "could not be written" in live.panel.message.value
    with pytest.raises(UserError, match="log.txt could not be written"): live.stop()
    assert (
        not live.record.is_open
        and checkpoints(live.trainer.run_dir.path)
        and lock_holder(live.trainer.run_dir.path) is None
    )


# Several panels


@in_event_loop
async def test_replaced_panel_stays_disabled(tmp_path, jupyter):
    "A panel that another one has replaced offers no buttons, also after its task has ended."
    first = Live(make("ppo", tmp_path, steps=6), tmp_path / "runs")
    first.start()
    await reach(first, 2)
    second = Live(first.trainer, tmp_path / "runs")
    second.start()
    await until(lambda: at_rest(first))
    assert first.panel.buttons["run"].disabled
    await finished(second)


@in_event_loop
async def test_replaced_panel_cannot_start(tmp_path, jupyter):
    "`start()` of a replaced panel loses no line of the run that another panel has taken over."
    first = Live(make("ppo", tmp_path, steps=15), tmp_path / "runs")
    first.start()
    await reach(first, 2)
    second = Live(first.trainer, tmp_path / "runs")
    second.start()
    with pytest.raises(UserError, match="another panel shows"): first.start()
    await finished(second)
    assert logged_steps(second) == [*range(1, 16)]
    assert outcome(second) == "finished"


@in_event_loop
async def test_run_button_pauses_other_training(tmp_path, jupyter):
    "The button Run pauses another training, as `start` does."
    first, second = (Live(make("ppo", tmp_path, name, steps=10**6), None) for name in ("one", "two"))
    first.start()
    await reach(first, 1)
    second.start()
    await reach(second, 1)
    press(first, "run")
    await asyncio.sleep(0.05)
    playing = [first.playing, second.playing]
    first.pause(); second.pause()
    await until(lambda: at_rest(first) and at_rest(second))
    assert playing == [True, False]


@in_event_loop
async def test_deleted_trainer_is_freed(tmp_path, jupyter):
    "A notebook that creates trainer and panel again does not keep the weights of the old ones."
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


@in_event_loop
async def test_deleted_panel_closes_its_run(tmp_path, jupyter, recwarn):
    "A panel that is paused and deleted leaves a run that is interrupted and not locked, without warnings."
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
    assert read_metadata(run)["outcome"] == "interrupted" and lock_holder(run) is None
    assert not [w for w in recwarn if "ignored" in str(w.message)]


@in_event_loop
async def test_new_trainer_of_the_same_run(tmp_path, jupyter):
    "The cell that creates trainer and panel runs again during training: only the second writes the run."
    first = Live(make("ppo", tmp_path, steps=50), tmp_path / "runs")
    first.start()
    await reach(first, 2)
    second = Live(make("ppo", tmp_path, steps=6), tmp_path / "runs")
    second.start()
    await finished(second)
    press(first, "run")
    await until(lambda: at_rest(first))
    assert "newer run" in first.panel.message.value
    live = second
    assert logged_steps(live) == [*range(1, 7)]
    assert outcome(live) == "finished"


# Interrupts


@in_event_loop
async def test_no_interrupt_handler_is_left(tmp_path, jupyter):
    "A training that ends while another cell runs leaves no handler; interrupts reach the next training."
    first = Live(make("ppo", tmp_path, "one", steps=8), None)
    first.start()
    await reach(first, 2)
    # a cell begins, as the kernel has it …
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    await finished(first)
    signal.signal(signal.SIGINT, before)                              # … and ends
    second = Live(make("ppo", tmp_path, "two", steps=25), None)
    second.start()
    await reach(second, 2)
    interrupt()
    await until(lambda: at_rest(second))
    stopped = second.trainer.steps_done
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert stopped < 25


@in_event_loop
async def test_interrupt_cancels_sampling(tmp_path, jupyter):
    "Sampling that takes very long can be interrupted."
    live = Live(make("ppo", tmp_path, steps=4), None)
    def samples():
        interrupt(3)
        reached.append(1)
        return []
    reached, live.trainer.samples = [], samples
    live.start()
    press(live, "sample")
    await until(lambda: at_rest(live))
    assert not reached


@in_event_loop
async def test_interrupt_during_wait(tmp_path, jupyter):
    "`wait` trains to the end, pauses at an interrupt, and restores the handler."
    live = Live(make("ppo", tmp_path, steps=8), tmp_path / "runs")
    live.trainer.callbacks.append(once(lambda t, m: m["step"] == 3, interrupt))
    live.start()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    assert not live.wait() and live.trainer.steps_done == 3
    live.start()
    assert live.wait()
    assert signal.signal(signal.SIGINT, before) == signal.default_int_handler
    await finished(live)
    assert outcome(live) == "finished"


@pytest.mark.parametrize("hours", [-1, 0, 1])
@in_event_loop
async def test_run_all_uses_the_browsers_clock(hours, tmp_path, jupyter, monkeypatch):
    "Which cells were sent together is decided by the browser's clock, which may be wrong by an hour."
    now = lambda: datetime.now(UTC) + timedelta(hours=hours)
    header = {"date": now()}
    shell = SimpleNamespace(ast_transformers=[],
                            kernel=SimpleNamespace(get_parent=lambda channel="shell": {"header": header}))
    monkeypatch.setattr(lab, "get_ipython", lambda: shell)
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


# Panel


@pytest.mark.parametrize("factor", [0.0, 1e-4, 50.0])
def test_slider_shows_unusual_values(factor, jupyter):
    "A panel created while a knob is outside the usual range shows its value."
    panel = Panel(Knobs(learning_rate_factor=factor), 10, lambda name: None)
    panel.refresh(0, "", False, False)
    assert (
        panel.sliders["learning_rate_factor"].value == pytest.approx(max(factor, 1e-6))
        and panel.knobs.learning_rate_factor == factor
    )


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-9, 1e9])
def test_unshowable_factor_is_kept(value, jupyter):
    "A factor that the slider cannot show is kept."
    panel = Panel(Knobs(learning_rate_factor=1), 10, lambda name: None)
    panel.knobs.learning_rate_factor = value
    for _ in range(3): panel.refresh(0, "", True, False)
    assert panel.knobs.learning_rate_factor == value
    panel.sliders["learning_rate_factor"].value = 0.5
    assert panel.knobs.learning_rate_factor == 0.5


def test_slider_moved_during_refresh(jupyter):
    "A slider that is moved all the time on another thread determines the final value."
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


@in_event_loop
async def test_plain_trainer(jupyter):
    "A trainer without a stage trains in a panel; Sample reports that it has no samples, and does not pause."
    trainer = Trainer(nn.Linear(2, 1), lambda model, x: (mx.square(model(x)).sum(), mx.array(x.shape[0])),
                      lambda step: mx.ones((4, 2)), 50)
    live = Live(trainer)
    live.start()
    await until(lambda: trainer.steps_done >= 2)
    press(live, "sample"); press(live, "save")
    await finished(live)
    assert "AttributeError" not in live.panel.message.value


def test_samples_and_messages_are_escaped(jupyter):
    "Neither markup nor formulas get into samples and messages."
    table = samples_table([("<b>$x$</b>", "</code><script>$y$", 1.0)], "after")
    assert "<b>" not in table and "<script>" not in table
    panel = Panel(Knobs(a=1), 1, lambda name: None)
    panel.show_message("</code><script>$x$")
    assert "<script>" not in panel.message.value


@in_event_loop
async def test_error_during_stop_is_shown(tmp_path, jupyter):
    "Stop during a step whose reward then fails: the error is shown."
    broken = []
    live = Live(make("ppo", tmp_path, steps=6, reward=lambda p, r: fail() if broken else count_a(p, r)),
                tmp_path / "runs")
    live.start()
    await reach(live, 2)
    live.pause()
    live._pieces = live.trainer.phases()                            # suspended at its beginning
    broken.append(1)
    live.stop()
    await until(lambda: at_rest(live))
    assert "no more" in live.panel.message.value


@in_event_loop
async def test_error_message_is_cleared_on_run(tmp_path, jupyter):
    "An error message is removed when the training is resumed successfully."
    broken = [1]
    live = Live(make("ppo", tmp_path, steps=6, reward=lambda p, r: fail() if broken else count_a(p, r)),
                None)
    live.start()
    await until(lambda: at_rest(live))
    broken.clear()
    await resume_to_end(live)
    assert "no more" not in live.panel.message.value


@in_event_loop
async def test_dollar_in_title(tmp_path, jupyter):
    "A dollar sign in a title or a metric's name is not a formula."
    live = Live(make("ppo", tmp_path, steps=3), None, panels={"price in $ of _ $": ("reward",)})
    live.start()
    await until(lambda: at_rest(live))
    assert live.is_over


# Further faults


@in_event_loop
async def test_second_click_on_pause_is_not_run(tmp_path, jupyter):
    "Pause during a long step changes the button; a second click on the old label is not Run."
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


@pytest.mark.parametrize("saved", [False, True])
@in_event_loop
async def test_failed_save_at_stop_loses_nothing(saved, tmp_path, jupyter, monkeypatch):
    "A disk that is full at Stop, and later is not: no log line and no knob change is lost."
    live = Live(make("ppo", tmp_path, steps=8), tmp_path / "runs")
    live.start()
    await reach(live, 2)
    live.pause()
    if saved: live._perform("save")
    live.trainer.knobs.kl_coef = 0.4
    at = live.trainer.steps_done
    for _ in range(2): live.trainer.step()
    with monkeypatch.context() as patch:
        patch.setattr("mlx_pretrain.run.write_checkpoint", lambda *args: fail())
        with pytest.raises(ValueError): live.stop()
    await resume_to_end(live)
    assert logged_steps(live) == [*range(1, 9)]
    assert events(live.trainer.run_dir.path) == [(at, "kl_coef", 0.4)] and outcome(live) == "finished"


@in_event_loop
async def test_interrupt_during_save_at_stop(tmp_path, jupyter, monkeypatch):
    "Interrupted while Stop saves: no message says that it is saved, and it can be saved again."
    live = Live(make("ppo", tmp_path, steps=50), tmp_path / "runs")
    live.start()
    await reach(live, 2)
    cut, write = once(lambda: True, lambda: interrupt(2)), run.write_checkpoint
    monkeypatch.setattr("mlx_pretrain.run.write_checkpoint", lambda *args: (cut(), write(*args))[1])
    await stop_and_wait(live)
    assert not checkpoints(live.trainer.run_dir.path) and "saved" not in live.panel.message.value
    press(live, "run")
    await reach(live, 8)
    await stop_and_wait(live)
    assert "saved" in live.panel.message.value and checkpoints(live.trainer.run_dir.path)
    assert logged_steps(live) == [*range(1, live.trainer.steps_done + 1)]


@in_event_loop
async def test_second_panel_adds_run_directory(tmp_path, jupyter):
    "A panel without a run directory, then one with: the second records from there on."
    first = Live(make("ppo", tmp_path, steps=8), None)
    first.start()
    await reach(first, 2)
    second = Live(first.trainer, tmp_path / "runs")
    at = first.trainer.steps_done
    second.start()
    await finished(second)
    at, live = at, second
    assert outcome(live) == "finished" and logged_steps(live) == [*range(at + 1, 9)]


@in_event_loop
async def test_knob_change_after_guard_is_replayed(tmp_path, jupyter):
    "A training that a guard stops, and a slider helps, is repeated from its metrics, to the same weights."
    def wild():
        trainer = make("ppo", tmp_path, steps=40)
        trainer.knobs.learning_rate_factor = 3000.0
        return trainer
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
    again = make("ppo", tmp_path, steps=40)
    replay_knobs(again, live.trainer.run_dir.path)
    while again.steps_done < live.trainer.steps_done:
        try: again.step()
        except TrainingError: pass
    assert same(again, live.trainer) and len(events(live.trainer.run_dir.path)) == 2


@in_event_loop
async def test_save_covers_manual_steps(tmp_path, jupyter):
    "Save after manual steps behind a Stop saves them; before the first Run it creates the run directory."
    live = Live(make("ppo", tmp_path, steps=20), tmp_path / "runs")
    live.show()
    press(live, "save")
    await until(lambda: "Saved in" in live.panel.message.value)
    press(live, "run")
    await reach(live, 2)
    live.stop()
    for _ in range(3): live.trainer.step()
    press(live, "save")
    await until(lambda: "Saved in" in live.panel.message.value)
    assert checkpoints(live.trainer.run_dir.path)[-1].name == f"step_{live.trainer.steps_done:06d}"
    live.trainer.step()
    live.stop()
    assert checkpoints(live.trainer.run_dir.path)[-1].name == f"step_{live.trainer.steps_done:06d}"


@in_event_loop
async def test_knob_change_before_panel_is_logged(tmp_path, jupyter):
    "A knob changed for a manual step, before there was a panel and a run directory, is logged."
    trainer = make("ppo", tmp_path, steps=6)
    trainer.knobs.kl_coef = 0.4
    trainer.step()
    live = Live(trainer, tmp_path / "runs")
    live.start()
    await finished(live)
    again = make("ppo", tmp_path, steps=6)
    assert events(live.trainer.run_dir.path) == [(0, "kl_coef", 0.4)]
    replay_knobs(again, live.trainer.run_dir.path)
    again.run()
    assert same(again, live.trainer)


@in_event_loop
async def test_final_warnings_are_shown(tmp_path, jupyter):
    "Warnings at the end of a run are shown next to the message that it is finished."
    trainer = make("pretrain", tmp_path, steps=4)
    trainer.validation_interval, values = 2, iter([1.0, 2.0])
    trainer.evaluate = lambda: {"val_loss": next(values)}
    live = Live(trainer, tmp_path / "runs")
    live.start()
    await finished(live)
    said = live.panel.message.value
    assert "Validation was best at step 2" in said and "Finished" in said


@in_event_loop
async def test_rejected_start_pauses_nothing(tmp_path, jupyter):
    "A training whose run directory cannot be used does not pause the one that runs."
    Live(make("ppo", tmp_path, "taken", steps=2), tmp_path / "runs").run()
    first = Live(make("ppo", tmp_path, "one", steps=10**6), None)
    first.start()
    await reach(first, 1)
    with pytest.raises(UserError, match="exists already"):
        Live(make("ppo", tmp_path, "taken", steps=2), tmp_path / "runs").start()
    playing = first.playing
    first.pause()
    await until(lambda: at_rest(first))
    assert playing


@in_event_loop
async def test_pauses_do_not_count_as_training_time(tmp_path, jupyter):
    "A run's recorded seconds exclude those in which it was paused."
    live, began = Live(make("ppo", tmp_path, steps=6), tmp_path / "runs"), time.perf_counter()
    live.start()
    await reach(live, 2)
    live.pause()
    await asyncio.sleep(1)
    await resume_to_end(live)
    live, passed = live, time.perf_counter() - began
    assert 0 < read_metadata(live.trainer.run_dir.path)["took"]["seconds"] <= passed - 1


@in_event_loop
async def test_silent_requests_do_not_wait(tmp_path, jupyter, monkeypatch):
    "A request that a front end makes for itself, such as for its list of variables, is not a cell."
    parent = {"header": {"date": datetime.now(UTC)}, "content": {"silent": False}}
    shell = SimpleNamespace(ast_transformers=[],
                            kernel=SimpleNamespace(get_parent=lambda channel="shell": parent))
    monkeypatch.setattr(lab, "get_ipython", lambda: shell)
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


@in_event_loop
async def test_finished_training_is_freed(tmp_path, jupyter, monkeypatch):
    "When a training has finished, deleting panel and trainer frees the weights, though the shell lives on."
    shell = SimpleNamespace(ast_transformers=[],
                            kernel=SimpleNamespace(get_parent=lambda channel="shell": {}))
    monkeypatch.setattr(lab, "get_ipython", lambda: shell)
    held = [Live(make("ppo", tmp_path, steps=2), None)]
    held[0].start()
    await until(lambda: held[0].is_over and at_rest(held[0]))
    gone = weakref.ref(held.pop().trainer)
    await asyncio.sleep(0)
    gc.collect()
    assert gone() is None


# Playground


def make_playground(tmp_path, rows, pretrained=None, **data):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    cfg = {"data": {"input_file": str(file), "preprocessing": {"max_context_size": 64}, **data},
           "model": {"dimensions": {"hidden_size": 32, "num_layers": 1}, "attention": {"num_heads": 2}},
           "training": {"hyperparameters": {"iters": 1, "batch_size": 1}}}
    return Playground(SFTConfig.model_validate_json(json.dumps(cfg)), pretrained)


def playground_tokens(play):
    "The tokens of the first row, and which are trained, in the playground."
    fmt = play.start.model_copy(update=play.formats)
    example, cut, _ = tokenize_row(play.rows[0], fmt, play.tokenizer, play.cfg)
    kept = [n for n in range(len(example.ids)) if n not in cut]
    return [example.ids[n] for n in kept], [example.loss_mask[n] for n in kept]


def trainer_tokens(play):
    "The same of a trainer."
    ids, mask = SFTTrainer(play.config(), play.pretrained).data[0]
    return [*map(int, ids)], [*map(bool, mask)]


CONVERSATION = {"messages": [{"role": "user", "content": "say a"}, {"role": "assistant", "content": "a"}]}
ROWS = {"messages": CONVERSATION, "text": {"text": "the cat sat"},
        "verbatim": {"prompt": "2+2=", "completion": "4"},
        "pair": {"instruction": "say a", "response": "a"}, "output": {"instruction": "say a", "output": "a"}}


@pytest.mark.parametrize("mask_prompt", [True, False])
@pytest.mark.parametrize("form", ROWS)
def test_playground_tokens_are_the_trainers(form, mask_prompt, tmp_path):
    "Rows of every kind: the playground shows the tokens and the mask of a trainer."
    play = make_playground(tmp_path, [ROWS[form]], mask_prompt=mask_prompt)
    assert "border-left" not in play.view.value
    assert playground_tokens(play) == trainer_tokens(play)


@pytest.mark.parametrize("form", ["messages", "pair"])
@pytest.mark.parametrize("edit", [False, True])
def test_playground_tokens_with_chat_template(form, edit, tmp_path):
    "With a pretrained model's chat template, formats are accepted by a trainer, and give the same tokens."
    play = make_playground(tmp_path, [ROWS[form]], chat_model())
    if edit: play.texts["system_prompt"].value = "be brief"
    assert "border-left" not in play.view.value
    assert playground_tokens(play) == trainer_tokens(play)


def chat_model(system=None, fmt=None):
    "A pretrained model with a chat template."
    tok = tokenizer("bytes")
    args = LlamaArgs(vocab_size=tok.vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                     num_attention_heads=2, num_key_value_heads=2, head_dim=16, max_position_embeddings=64)
    class Chatty(type(tok)):
        chat_template = ("{% for m in messages %}[{{ m.role }}]{{ m.content }}"
                         "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
                         "{% if add_generation_prompt %}[assistant]{% endif %}")
    made = Chatty()
    return Pretrained(Llama(args, 0), made, Path("chatty"),
                      fmt or PromptFormat(prompt_format=None, system_prompt=system))


@pytest.mark.parametrize("form", ["messages", "pair"])
def test_inherited_system_prompt_can_be_cleared(form, tmp_path):
    "A pretrained model's system prompt that is cleared in the playground is absent in the trainer too."
    play = make_playground(tmp_path, [ROWS[form]], chat_model(fmt=PromptFormat(system_prompt="SYSTEM")))
    assert "S" in map(play.tokenizer.piece, playground_tokens(play)[0])
    play.texts["system_prompt"].value = ""
    assert "Y" not in map(play.tokenizer.piece, playground_tokens(play)[0])
    assert playground_tokens(play) == trainer_tokens(play)


def test_model_context_limits_rows(tmp_path):
    "A row that is longer than the model's context is not reported to fit."
    play = make_playground(tmp_path, [{"instruction": "x" * 80, "response": "y"}, ROWS["pair"]],
                  chat_model(fmt=PromptFormat()), preprocessing={})
    assert "there is room" not in play.view.value


def test_response_in_prompt_is_rejected(tmp_path):
    "A prompt that contains the column of the response is rejected, as by a trainer."
    play = make_playground(tmp_path, [ROWS["output"]])
    play.texts["prompt_format"].value = "{instruction} {output}"
    assert "border-left" in play.view.value
    with pytest.raises(ConfigError, match="response"): SFTTrainer(play.config())


def test_long_trained_prompt_is_rejected(tmp_path):
    "With mask_prompt: false, a prompt that leaves no room gives the trainer's error."
    play = make_playground(tmp_path, [{"instruction": "x" * 90, "response": "y"}], mask_prompt=False)
    with pytest.raises(UserError, match="the prompt has"): SFTTrainer(play.config())
    assert "the prompt has" in play.view.value


def test_huge_row_makes_small_page(tmp_path):
    "A row of a hundred thousand characters does not make a page of many megabytes."
    play = make_playground(tmp_path, [{"instruction": "x", "response": "y" * 10**5}])
    assert len(play.view.value) < 2 * 10**6


@pytest.mark.parametrize("rows", [[], ["\n\n"], ["no json\n"], [{"a": 1}]])
@pytest.mark.parametrize("how", ["error", "skip"])
def test_file_without_usable_rows(rows, how, tmp_path):
    "A file without a usable row is one sentence."
    with pytest.raises(UserError): make_playground(tmp_path, rows, on_bad_row=how)


def test_bad_rows_are_skipped(tmp_path):
    "Bad rows are left out with skip; one that lacks a column is shown with its error and the file's line."
    rows = ["broken\n", ROWS["pair"], "[1]\n", {"instruction": "only"}, ROWS["pair"]]
    play = make_playground(tmp_path, rows, on_bad_row="skip")
    assert [row.line for row in play.rows] == [2, 4, 5]
    play.row.value = 2
    assert "line 4" in play.view.value and "border-left" in play.view.value
    play.row.value = 99
    assert "line 5" in play.view.value and "border-left" not in play.view.value


@pytest.mark.parametrize("text", ["{", "}", "{instruction", "{}", "{0}", "{instruction!r}", "{a.b}",
                                  "{nobody}", "", "{response}", "{{}}"])
@pytest.mark.parametrize("key", ["prompt_format", "response_format"])
def test_broken_formats(key, text, tmp_path):
    "Any text as a format gives a sentence or tokens, and a trainer agrees."
    play = make_playground(tmp_path, [ROWS["pair"]])
    play.texts[key].value = text
    bad = "border-left" in play.view.value
    try: trainer_tokens(play)
    except UserError: assert bad
    else: assert not bad and playground_tokens(play) == trainer_tokens(play)


def test_rows_are_escaped(tmp_path):
    "Text of rows, formats and file names stays text, and dollar signs are inside code."
    folder = tmp_path / "a$b$<b>"
    folder.mkdir()
    play = make_playground(folder, [{"instruction": "<script>$x$", "response": "</code><b>"}])
    assert "<script>" not in play.view.value and "<b>" not in play.view.value
    assert "$" not in re.sub(r"<code.*?</code>", "", play.view.value, flags=re.S)


def test_edits_on_another_thread(tmp_path):
    "Formats edited on another thread end as they were written last."
    play = make_playground(tmp_path, [ROWS["pair"]])
    def edit():
        for n in range(20): play.texts["prompt_format"].value = f"{n} {{instruction}}"
    thread = threading.Thread(target=edit)
    thread.start(); thread.join()
    assert play.formats["prompt_format"] == "19 {instruction}" and "19 {instruction}" in play.view.value
