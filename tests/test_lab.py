"The live panel without a browser: buttons, sliders, interrupts and errors never change a training's numbers."
import asyncio
import functools
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from types import SimpleNamespace

import mlx_pretrain  # noqa: F401, I001 (before MLX)

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from test_reward import pairs, trainer_on
from toys import task

from mlx_pretrain import lab
from mlx_pretrain.config import UserError
from mlx_pretrain.lab import Live
from mlx_pretrain.pretrain import PretrainConfig, PretrainTrainer
from mlx_pretrain.run import checkpoints, read_metadata, read_metrics
from mlx_pretrain.sft import SFTConfig, SFTTrainer
from mlx_pretrain.trainer import TrainingError, replay_knobs

STAGES = ["pretrain", "sft", "reward", "ppo"]


def count_a(prompt, response): return response.count("a") / 8


@pytest.fixture
def jupyter(monkeypatch):
    "As in JupyterLab: a running event loop, a shell, and a list of what was displayed."
    shown, idle = [], signal.signal(signal.SIGINT, signal.SIG_IGN)        # as an idle kernel has it
    kernel = SimpleNamespace(get_parent=lambda channel: {})
    monkeypatch.setattr(lab, "kernel_loop", lambda: asyncio.get_running_loop())
    monkeypatch.setattr(lab, "get_ipython", lambda: SimpleNamespace(ast_transformers=[], kernel=kernel))
    monkeypatch.setattr(lab, "display", lambda *args, **kwargs: shown.append((args, kwargs)))
    yield shown
    assert signal.signal(signal.SIGINT, idle) == signal.SIG_IGN           # no handler is left
    assert not [h for h in logging.getLogger("mlx_pretrain").handlers if isinstance(h, lab._WarningHandler)]


def make(stage, tmp_path, name=None, steps=12, reward=count_a, **data):
    "A tiny trainer of a stage."
    if stage == "ppo": trainer = task(reward, steps=steps, batch=16, response_length=6, **data)
    elif stage == "reward": trainer = trainer_on(tmp_path, pairs(60), pairs(8, seed=1), steps=steps)
    else:
        rows = (
            [{"text": "the cat sat on the mat. " * 40}]
            if stage == "pretrain"
            else [{"instruction": f"say {w}", "response": w} for w in ("red", "green", "blue", "white") * 4]
        )
        file = tmp_path / f"{stage}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        cls, of = (PretrainConfig, PretrainTrainer) if stage == "pretrain" else (SFTConfig, SFTTrainer)
        trainer = of(
            cls.model_validate_json(
                json.dumps(
                    {
                        "data": {
                            "input_file": str(file),
                            "validation_file": str(file),
                            "preprocessing": {"max_context_size": 64},
                        },
                        "model": {
                            "dimensions": {"hidden_size": 32, "num_layers": 1},
                            "attention": {"num_heads": 2},
                        },
                        "training": {
                            "hyperparameters": {"batch_size": 4, "learning_rate": 3e-3, "iters": steps}
                        },
                    }
                )
            )
        )
    trainer.cfg = trainer.cfg.model_copy(update={"name": name or stage})
    return trainer


def same(a, b):
    pairs = [*zip(tree_flatten(a.arrays()), tree_flatten(b.arrays()), strict=True)]
    return bool(pairs) and all(name == other and mx.array_equal(x, y).item()
                               for (name, x), (other, y) in pairs)


def lines(run):
    return [{k: v for k, v in line.items() if k != "tokens_per_second"}
            for line in read_metrics(run) if "event" not in line]


async def until(condition, attempts=3000):
    "Let the loop run until a condition holds."
    for _ in range(attempts):
        if condition(): return
        await asyncio.sleep(0.005)
    raise AssertionError("the condition was not met in time")


async def reach(live, step, paused=False):
    "Let the loop run until so many steps are done and, if `paused`, the training has come to rest."
    await until(lambda: live.trainer.steps_done >= step and (at_rest(live) or not paused))


def in_event_loop(test):
    "Run an async test in an event loop of its own, as a cell runs in the kernel's."
    @functools.wraps(test)
    def run(**fixtures): return asyncio.run(test(**fixtures))
    return run


def logged_steps(live): return [row["step"] for row in lines(live.trainer.run_dir.path)]
def at_rest(live): return live.task.is_finished and not live.playing
def press(live, name): live.panel.buttons[name].click()


@pytest.mark.parametrize("stage", STAGES)
@in_event_loop
async def test_panel_does_not_change_training(stage, tmp_path, jupyter):
    "In a panel a trainer of each stage has the same weights, log and model; a sample changes nothing."
    plain = make(stage, tmp_path)
    plain.run()
    live = Live(make(stage, tmp_path), tmp_path / "runs")
    live.start()
    assert live.trainer.steps_done == 0  # the cell returns immediately
    await reach(live, 3)
    press(live, "sample")
    await until(lambda: live.is_over and at_rest(live))
    assert "after step" in live.panel.samples.value
    assert same(live.trainer, plain)
    run = live.trainer.run_dir.path
    assert read_metadata(run)["outcome"] == "finished" and (run / "model" / "model.safetensors").exists()
    assert (
        "Finished" in live.panel.message.value
        and live.panel.buttons["run"].disabled
        and live.panel.bar.value == 12
    )
    assert [name for panel in live.curves.panels.values()
            for name in panel if len(live.curves[name][0]) == 12]


@in_event_loop
async def test_buttons(tmp_path, jupyter):
    "Pause, single steps, save, run, stop, and run again, pressed on another thread; no step counts twice."
    def pressed(live, name):
        thread = threading.Thread(target=press, args=(live, name))
        thread.start(); thread.join()
    live = Live(make("ppo", tmp_path, steps=24), tmp_path / "runs")
    live.start()
    await reach(live, 3)
    assert live.panel.buttons["run"].description == "Pause"
    pressed(live, "run")
    await until(lambda: at_rest(live))
    at = live.trainer.steps_done
    await asyncio.sleep(0.05)
    assert (
        live.trainer.steps_done == at
        and live.panel.buttons["run"].description == "Run"
        and "paused" in live.panel.status.value
    )
    for n in (1, 2):
        pressed(live, "step")
        await until(lambda n=n: live.trainer.steps_done == at + n and at_rest(live))
    pressed(live, "save")
    await until(lambda: "Saved in" in live.panel.message.value)
    assert checkpoints(live.trainer.run_dir.path)[-1].name == f"step_{at + 2:06d}"
    pressed(live, "run")
    await until(lambda: live.trainer.steps_done >= at + 5)
    pressed(live, "stop")
    await until(lambda: "Stopped after step" in live.panel.message.value and at_rest(live))
    stopped, run = live.trainer.steps_done, live.trainer.run_dir.path
    assert (
        read_metadata(run)["outcome"] == "interrupted"
        and checkpoints(run)[-1].name == f"step_{stopped:06d}"
    )
    pressed(live, "run")
    await until(lambda: live.is_over and at_rest(live))
    assert read_metadata(run)["outcome"] == "finished"
    plain = make("ppo", tmp_path, steps=24)
    plain.run()
    assert same(live.trainer, plain) and [line["step"]
                                          for line in lines(live.trainer.run_dir.path)] == [*range(1, 25)]


KNOB_CHANGES = {2: ("kl_coef", 0.4), 4: ("learning_rate_factor", 2.0), 5: ("clip_range", 0.1),
         7: ("temperature", 1.3), 8: ("target_kl", 0.01), 9: ("learning_rate_factor", 0.5)}


def steer(tmp_path, name="steered", stage="ppo", changes=KNOB_CHANGES):
    "A training whose sliders are moved, each on its own thread right after a step."
    async def main():
        live = Live(make(stage, tmp_path, name), tmp_path / "runs")

        def move(trainer, metrics):
            if metrics["step"] not in changes: return
            knob, value = changes[metrics["step"]]
            thread = threading.Thread(target=lambda: setattr(live.panel.sliders[knob], "value", value))
            thread.start(); thread.join()
        live.trainer.callbacks.append(move)
        live.start()
        await until(lambda: live.is_over and at_rest(live))
        return live
    return asyncio.run(main())


def check_reached(live, changes):
    metrics = read_metrics(live.trainer.run_dir.path)
    events = [(line["step"], line["name"], line["value"]) for line in metrics if line.get("event") == "knob"]
    assert events == [(step, *change) for step, change in changes.items()] == live.curves.knob_changes


def test_slider_affects_next_step(tmp_path, jupyter):
    "Moved after step n, a slider is an event before step n + 1, which uses the new value."
    live = steer(tmp_path)
    check_reached(live, KNOB_CHANGES)
    rates = [line["learning_rate"] for line in lines(live.trainer.run_dir.path)]
    unsteered = steer(tmp_path, "plain", changes={})
    scheduled = [line["learning_rate"] for line in lines(unsteered.trainer.run_dir.path)]
    factors = [1] * 4 + [2] * 5 + [0.5] * 3
    assert rates == pytest.approx([factor * rate for factor, rate in zip(factors, scheduled)])
    assert rates[4] > rates[3]


def test_planted_dead_slider_is_detected(tmp_path, jupyter, monkeypatch):
    "The check above fails on a panel whose sliders set no knob."
    monkeypatch.setattr(lab.KnobSliders, "set_knob", lambda self, name, value: None)
    live = steer(tmp_path)
    with pytest.raises(AssertionError): check_reached(live, KNOB_CHANGES)


@pytest.mark.parametrize("stage", ["ppo", "pretrain"])
def test_steered_run_is_replayed(stage, tmp_path, jupyter):
    "From its metrics a steered run is repeated to the same weights; without its knob changes they differ."
    changes = {3: ("learning_rate_factor", 3.0), 6: ("learning_rate_factor", 0.2)}
    if stage == "ppo": changes = KNOB_CHANGES
    live = steer(tmp_path, stage=stage, changes=changes)
    again, plain = make(stage, tmp_path), make(stage, tmp_path)
    replay_knobs(again, live.trainer.run_dir.path)
    again.run(); plain.run()
    assert same(again, live.trainer) and not same(plain, live.trainer)


@pytest.mark.parametrize("at", ["sample", "score", "update"])
@in_event_loop
async def test_interrupt_pauses_after_step(at, tmp_path, jupyter):
    "An interrupt in any phase of a step lets it end, and pauses; resumed, it is the undisturbed training."
    trainer = make("ppo", tmp_path, steps=8)
    live, phases, done = Live(trainer, None), trainer.phases, []

    def watched():
        pieces = phases()
        while True:
            try: phase = next(pieces)
            except StopIteration as end: return end.value
            if phase == at and trainer.partial_step.number == 3 and not done:
                done.append(os.kill(os.getpid(), signal.SIGINT))
            yield phase
    trainer.phases = watched
    live.start()
    await until(lambda: done and at_rest(live))
    assert (
        trainer.steps_done == 4 and "paused" in live.panel.status.value and not live.panel.message.value
    )
    press(live, "run")
    await until(lambda: live.is_over and at_rest(live))
    plain = make("ppo", tmp_path, steps=8)
    plain.run()
    assert same(trainer, plain)


@in_event_loop
async def test_double_interrupt_cancels_step(tmp_path, jupyter):
    "The second interrupt cancels a slow reward: nothing is counted, and Run resumes the step."
    def slow(prompts, responses):
        if len(calls) == 3: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]
        calls.append(1)
        return [count_a("", r) for r in responses]
    calls = []

    class Slow(mlx_pretrain.core.RewardModel):
        compute_reward = staticmethod(slow)
    live = Live(make("ppo", tmp_path, steps=6, reward=Slow()), None)
    live.start()
    await until(lambda: len(calls) == 3 and at_rest(live))
    assert live.trainer.steps_done == 3 and "Step interrupted" in live.panel.message.value
    calls.append(1)
    press(live, "run")
    await until(lambda: live.is_over and at_rest(live))
    trainer = live.trainer
    plain = make("ppo", tmp_path, steps=6)
    plain.run()
    assert same(trainer, plain)


@in_event_loop
async def test_error_in_step_pauses(tmp_path, jupyter, capsys):
    "A reward that fails pauses the training; its message is shown escaped; once fixed, Run resumes exactly."
    broken = []
    def reward(prompt, response):
        if broken: raise ValueError("<b>salt</b> is out")
        return count_a(prompt, response)
    live = Live(make("ppo", tmp_path, steps=6, reward=reward), tmp_path / "runs")
    live.start()
    await reach(live, 2)
    broken.append(1)
    await until(lambda: at_rest(live))
    assert "&lt;b&gt;salt" in live.panel.message.value and "<b>salt" not in live.panel.message.value
    assert "paused" in live.panel.status.value and not live.is_over
    broken.clear()
    press(live, "run")
    await until(lambda: live.is_over and at_rest(live))
    trainer = live.trainer
    plain = make("ppo", tmp_path, steps=6)
    plain.run()
    assert same(trainer, plain) and read_metadata(trainer.run_dir.path)["outcome"] == "finished"


@in_event_loop
async def test_guard_pauses_and_slider_helps(tmp_path, jupyter):
    "A training that a guard stops continues in the same panel with a smaller learning rate."
    live = Live(make("ppo", tmp_path, steps=30), None)
    live.panel.sliders["learning_rate_factor"].value = 10.0
    live.trainer.schedule = lambda step: 0.3
    live.start()
    await until(lambda: at_rest(live))
    assert not live.is_over and "step" in live.panel.message.value
    at, live.trainer.schedule = live.trainer.steps_done, lambda step: 1e-9
    press(live, "step")
    await until(lambda: live.trainer.steps_done == at + 1 and at_rest(live))


@in_event_loop
async def test_widgets_call_no_mlx(tmp_path, jupyter, monkeypatch):
    "Whatever is pressed or moved on another thread, MLX is called on the kernel's own only."
    live = Live(make("ppo", tmp_path, steps=10), None)
    live.start()
    await reach(live, 2)
    threads, others = set(), []
    for name in ("eval", "where", "exp", "arange"):
        monkeypatch.setattr(
            mx,
            name,
            lambda *a, real=getattr(mx, name), **k: (threads.add(threading.get_ident()), real(*a, **k))[
                1
            ],
        )
    def all_of_it():
        others.append(threading.get_ident())
        for name in ("sample", "save", "run", "step", "run"): press(live, name)
        for slider in live.panel.sliders.values(): slider.value = slider.value * 0.9
    thread = threading.Thread(target=all_of_it)
    thread.start()
    await until(lambda: live.is_over and at_rest(live))
    thread.join()
    assert threads == {threading.get_ident()} and others[0] not in threads


@in_event_loop
async def test_other_cells_between_pieces(tmp_path, jupyter):
    "Between pieces of a step cells read the weights; a manual step is rejected until it is paused."
    live = Live(make("ppo", tmp_path, steps=10**6), None)
    live.start()
    refused = 0
    for _ in range(200):
        await asyncio.sleep(0.002)
        tree_flatten(live.trainer.arrays())
        if live._pieces is None: continue
        with pytest.raises(TrainingError, match="in progress"): live.trainer.step()
        refused += 1
        if refused > 3: break
    assert refused > 3
    live.pause()
    at = live.trainer.steps_done
    live.trainer.step()
    assert live.trainer.steps_done == at + 1 == live.curves["reward"][0][-1]
    await until(lambda: at_rest(live))


@in_event_loop
async def test_one_training_at_a_time(tmp_path, jupyter):
    "A second training pauses the first; a second panel of one trainer takes over its curves and its run."
    first = Live(make("ppo", tmp_path, "one", steps=10**6), None)
    first.start()
    await until(lambda: first.trainer.steps_done >= 2)
    second = Live(make("pretrain", tmp_path, steps=10**6), None)
    second.start()
    await until(lambda: second.trainer.steps_done >= 2 and at_rest(first))
    assert "another training" in first.panel.message.value
    second.pause()
    third = Live(make("ppo", tmp_path, "two", steps=12), tmp_path / "runs")
    third.start()
    await until(lambda: third.trainer.steps_done >= 3)
    fourth = Live(third.trainer, tmp_path / "runs")
    at = third.trainer.steps_done
    press(third, "run")  # the replaced panel is disabled
    assert (
        fourth.curves["reward"][0].tolist() == [*range(1, at + 1)] and third.panel.buttons["run"].disabled
    )
    fourth.start()
    await until(lambda: fourth.is_over and at_rest(fourth))
    assert [line["step"] for line in lines(tmp_path / "runs/two")] == [*range(1, 13)]


@in_event_loop
async def test_show_again(tmp_path, jupyter):
    "Shown again, the panel is the same, and both places of the picture are updated by one name."
    live = Live(make("ppo", tmp_path, steps=6), None)
    live.start()
    live.show()
    await until(lambda: live.is_over and at_rest(live))
    panels = [args[0] for args, kwargs in jupyter if "display_id" not in kwargs]
    pictures = [kwargs for _, kwargs in jupyter if "display_id" in kwargs]
    assert len(panels) == 2 and panels[0] is panels[1]
    assert len({kwargs["display_id"]
                for kwargs in pictures}) == 1 and [kwargs["update"]
                                                   for kwargs in pictures][:2] == [False, False]
    assert all(kwargs["update"]
               for kwargs in pictures[2:]) and "finished: step 6 of 6" in jupyter[-1][0][0]["text/plain"]


def test_resume_in_new_kernel_keeps_curves(tmp_path, jupyter):
    "In a new kernel, with resume: latest, a stopped training resumes in its run directory, with its curves."
    async def begin():
        live = Live(make("ppo", tmp_path, steps=10), tmp_path / "runs")
        live.start()
        live.panel.sliders["kl_coef"].value = 0.3
        await reach(live, 4)
        live.stop()
        return live.trainer.steps_done

    async def resume():
        trainer = make("ppo", tmp_path, steps=10)
        trainer.cfg = trainer.cfg.model_copy(
            update={"resume": trainer.cfg.resume.model_copy(update={"checkpoint": "latest"})}
        )
        live = Live(trainer, tmp_path / "runs")
        live.start()
        assert (
            len(live.curves["reward"][0]) == trainer.steps_done == at
            and live.panel.sliders["kl_coef"].value == 0.3
        )
        assert live.curves.knob_changes == [(0, "kl_coef", 0.3)]
        await until(lambda: live.is_over and at_rest(live))
        return trainer
    at = asyncio.run(begin())
    trainer, plain = asyncio.run(resume()), make("ppo", tmp_path, steps=10)
    plain.knobs.kl_coef = 0.3
    plain.run()
    assert same(trainer, plain) and [line["step"] for line in lines(tmp_path / "runs/ppo")] == [*range(1, 11)]


@in_event_loop
async def test_existing_run_is_rejected(tmp_path, jupyter):
    "A run that would replace another one is rejected in the cell, before anything is trained."
    Live(make("ppo", tmp_path, steps=2), tmp_path / "runs").run()
    live = Live(make("ppo", tmp_path, steps=2), tmp_path / "runs")
    with pytest.raises(UserError, match="overwrite"): live.start()
    await asyncio.sleep(0.05)
    assert live.trainer.steps_done == 0 and not live.playing
SCRIPT = """
    import mlx_pretrain, os, signal
    from toys import task
    from mlx_pretrain.lab import Live
    trainer = task(lambda prompt, response: response.count("a"), steps=6, batch=16, response_length=4)
    if {cut}: trainer.callbacks.append(lambda t, m: m["step"] == 3 and os.kill(os.getpid(), signal.SIGINT))
    live = Live(trainer, "runs")
    live.start()
    print(trainer.steps_done)
"""


@pytest.mark.parametrize("cut", [False, True])
def test_live_in_a_script(cut, tmp_path):
    "In a script `start` trains to the end, with a message and a progress bar; Ctrl-C saves, and ends it."
    env = os.environ | {"PYTHONPATH": os.path.dirname(__file__)}
    env.pop("IN_TEST", None)
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n" + textwrap.dedent(
        SCRIPT.format(cut=cut)
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert lab.NO_FRONT_END in done.stderr and "tok/s" in done.stderr
    assert read_metadata(tmp_path / "runs/run")["outcome"] == ("interrupted" if cut else "finished")
    assert (
        done.stdout.endswith("6\n")
        if not cut
        else "KeyboardInterrupt" in done.stderr and "step_000003" in done.stderr
    )


EXECUTED = """
live = Live(make("ppo", folder, steps=30), folder / "runs")
live.start()
assert live.is_done and live.trainer.steps_done == 30
print("trained to the end")
"""


@pytest.mark.long
def test_executed_by_nbclient(tmp_path):
    "Executed by nbclient, as by nbconvert and papermill, which press no buttons, the cell trains to the end."
    from nbclient import NotebookClient
    from nbformat import v4
    setup = (f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom pathlib import Path\n"
             f"folder = Path({str(tmp_path)!r})\nimport mlx_pretrain\nfrom test_lab import Live, make")
    cells = setup, EXECUTED
    nb = v4.new_notebook(cells=[*map(v4.new_code_cell, cells)])
    environment = {key: value for key, value in os.environ.items() if key != "IN_TEST"}
    NotebookClient(nb, timeout=120, kernel_name="python3",
                   resources={"metadata": {"path": str(tmp_path)}}).execute(env=environment)
    outputs = nb.cells[1].outputs
    printed = "".join(o.get("text", "") for o in outputs)
    assert lab.NO_FRONT_END in printed and "trained to the end\n" in printed
    assert [o.output_type for o in outputs].count("display_data") == 1


@in_event_loop
async def test_long_training_does_not_accumulate(tmp_path, jupyter):
    "A long training shows few pictures, keeps no task, and stores two numbers per point."
    live = Live(make("pretrain", tmp_path, steps=200), None)
    live.start()
    await until(lambda: live.is_over and at_rest(live))
    assert len(jupyter) < 30 and live.curves["loss"][1].nbytes == 8 * 200
