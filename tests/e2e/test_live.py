"The panel in a real JupyterLab: buttons, sliders and interrupts reach the training; messages are shown."
import json

import pytest
from conftest import Server

SETUP = """import json
import mlx_pretrain
from toys import task
from mlx_pretrain.lab import KnobSliders, Live
from mlx_pretrain.run import checkpoints, read_metrics
def count_a(prompt, response): return response.count("a") / 8
def ppo(name, steps=100_000, **data):
    data = {"kl_coef": 0.02, "guards": "warn", **data}
    trainer = task(count_a, steps=steps, batch=16, lr=3e-3, response_length=8, **data)
    trainer.cfg = trainer.cfg.model_copy(update={"name": name})
    return trainer"""
STATE = """kl = sum(live.curves['kl'][1][-20:]) / 20
print(json.dumps([live.trainer.steps_done, live.playing, live.trainer.knobs.kl_coef, kl]))"""
FIXABLE = """
broken = []
def count_a(prompt, response):
    assert not broken, "<b>salt</b> is out"
    return response.count("a") / 8"""
EVENTS = "print(json.dumps([line for line in read_metrics('runs/turned') if line.get('event') == 'knob']))"


START = "live = Live(ppo('x'), root=None)\nlive.start()"


def begin(open_notebook, *cells, start=START, setup=SETUP, **where):
    "A notebook in which a training has been started and the panel is shown; cell 2 prints its state."
    nb = open_notebook([setup, start, STATE, *cells], **where)
    nb.run(0)
    nb.run(1)
    nb.page.wait_for_timeout(600)
    return nb


def state(nb, i=2): return json.loads(nb.run(i))
def steps(nb): return state(nb)[0]


def is_paused(nb):
    before = steps(nb)
    nb.page.wait_for_timeout(400)
    return steps(nb) == before


def move_kl_coef(nb):
    "Let PPO leave its reference, drag the slider, run 150 steps: both states, and the slider's value."
    nb.until(lambda: state(nb)[3] > 3, timeout=60)
    before, shown = state(nb), nb.drag("kl_coef", 0.9)
    then = steps(nb)
    nb.until(lambda: steps(nb) > then + 150, timeout=60)
    return before, state(nb), shown


def check_moved(before, after, shown):
    assert before[2] == 0.02 and shown > 0.4 and after[2] == pytest.approx(shown)
    assert after[3] < 0.6 * before[3]


def test_slider_steers_running_training(open_notebook):
    "kl_coef is dragged while PPO runs: the trainer has it, it is logged as an event, and the KL falls."
    nb = begin(open_notebook, EVENTS, start="live = Live(ppo('turned'))\nlive.start()")
    picture = nb.pictures(1)
    before, after, shown = move_kl_coef(nb)
    check_moved(before, after, shown)
    nb.until(lambda: nb.pictures(1) != picture)
    assert len(nb.outputs(1)) == 2  # panel and picture, however long it runs
    events = json.loads(nb.run(3))
    assert {event["name"] for event in events} == {"kl_coef"} and events[-1]["value"] == after[2]
    assert before[0] <= events[0]["step"] <= events[-1]["step"] < after[0]


def test_planted_dead_slider_is_detected(open_notebook):
    "The same check fails on a panel whose sliders set no knob."
    nb = begin(open_notebook, setup=SETUP + "\nKnobSliders.set_knob = lambda self, name, value: None")
    with pytest.raises(AssertionError): check_moved(*move_kl_coef(nb))


def test_buttons(open_notebook):
    "Pause and Run, single steps, a sample, a checkpoint, and Stop; between them the training is paused."
    nb = begin(open_notebook,
               "print(json.dumps([[p.name for p in checkpoints('runs/pressed')], live.trainer.steps_done]))",
               start="live = Live(ppo('pressed'))\nlive.start()")
    nb.until(lambda: steps(nb) > 20)
    nb.press("Pause")
    nb.page.wait_for_selector("text=/paused: step/")
    assert is_paused(nb)
    at = steps(nb)
    for n in (1, 2):
        nb.press("Step")
        nb.until(lambda n=n: steps(nb) == at + n)
    assert is_paused(nb)
    nb.press("Sample")
    nb.page.wait_for_selector(f"text=after step {at + 2}")
    nb.press("Save")
    nb.page.wait_for_selector(f"text=/Saved in .*step_{at + 2:06d}/")
    saved, _ = json.loads(nb.run(3))
    assert f"step_{at + 2:06d}" in saved
    nb.press("Run")
    nb.until(lambda: steps(nb) > at + 12)
    nb.press("Stop")
    nb.page.wait_for_selector("text=/Stopped after step/")
    saved, done = json.loads(nb.run(3))
    assert saved[-1] == f"step_{done:06d}" and is_paused(nb)
    nb.press("Run")  # the run was closed, and is reopened
    nb.until(lambda: steps(nb) > done + 5)


def test_interrupt_pauses_and_run_resumes(open_notebook):
    "An interrupt pauses after the step, without an error; another cell's interrupt does not pause."
    nb = begin(open_notebook, "import time\ntime.sleep(60)")
    nb.until(lambda: steps(nb) > 20)
    nb.command("kernelmenu:interrupt")
    nb.page.wait_for_selector(".jupyter-button:has-text('Run')")
    assert is_paused(nb) and not state(nb)[1]
    at = steps(nb)
    nb.press("Run")
    nb.until(lambda: steps(nb) > at + 20)
    nb.send(3)
    nb.page.wait_for_timeout(700)
    nb.command("kernelmenu:interrupt")
    nb.wait(3)
    assert nb.errors(3) == ["KeyboardInterrupt: "]
    at = steps(nb)
    nb.until(lambda: steps(nb) > at + 20)                                 # the training continues
    assert not nb.errors(1) and len(nb.outputs(1)) == 2


def test_error_in_step_pauses_and_is_shown(open_notebook):
    "A reward that fails is one message in the panel; once fixed, the training resumes."
    setup = SETUP + FIXABLE
    nb = begin(open_notebook, "broken.append(1)", "broken.clear()", setup=setup)
    nb.until(lambda: steps(nb) > 20)
    nb.run(3)
    nb.page.wait_for_selector(".jupyter-button:has-text('Run')")
    assert "<b>salt</b> is out" in nb.page.inner_text(".widget-html >> nth=0")
    nb.run(4)
    at = steps(nb)
    nb.press("Run")
    nb.until(lambda: steps(nb) > at + 20)


def test_run_all_waits_for_the_end(open_notebook):
    "Sent together, the cell below sees a finished training; one that is run later does not wait."
    nb = open_notebook([SETUP, "live = Live(ppo('x', steps=60), root=None)\nlive.start()",
                        "print(live.trainer.steps_done, live.is_over)"])
    nb.command("notebook:run-all-cells")
    nb.wait(2)
    assert nb.text(2) == "60 True\n" and not nb.errors(1)
    assert "finished" in nb.page.inner_text(".jp-Notebook")


def test_run_all_interrupted(open_notebook):
    "Interrupted while the cells below wait: the training pauses, they are not run, and Run resumes."
    nb = open_notebook([SETUP, "live = Live(ppo('x'), root=None)\nlive.start()", "print('not yet')", STATE])
    nb.command("notebook:run-all-cells")
    nb.page.wait_for_selector("text=/running: step/")
    nb.page.wait_for_timeout(1000)
    nb.command("kernelmenu:interrupt")
    nb.page.wait_for_selector(".jupyter-button:has-text('Run')")
    nb.until(lambda: nb.errors(2))
    assert "InputRejected" in nb.errors(2)[0] and not nb.text(2)
    at = state(nb, 3)[0]
    nb.press("Run")
    nb.until(lambda: state(nb, 3)[0] > at + 5)
    assert nb.run(2) == "not yet\n"                                       # sent alone, it does not wait


def test_reload_and_show_again(open_notebook):
    "After a page reload the training still runs; `show()` brings back a working panel."
    nb = begin(open_notebook, "live.show()")
    nb.until(lambda: steps(nb) > 20)
    nb.command("docmanager:save")
    nb.open(reset=False)
    at = steps(nb)
    nb.until(lambda: steps(nb) > at + 20)
    nb.run(3)
    [picture] = nb.pictures(3)
    nb.until(lambda: nb.pictures(3) != [picture])
    shown = nb.drag("kl_coef", 0.7)
    nb.until(lambda: state(nb)[2] == pytest.approx(shown))
    assert shown > 0.2


FLICKER = """() => new Promise(done => {
  const cell = jupyterapp.shell.currentWidget.content.widgets[1].node;
  const seen = {frames: 0, bare: 0, pictures: new Set()};
  const end = performance.now() + 9000, look = () => {
    const image = cell.querySelector(".jp-OutputArea img");
    seen.frames += 1;
    if (!image || !image.complete || !image.naturalWidth) seen.bare += 1;
    else seen.pictures.add(image.src.length + image.src.slice(-200));
    if (performance.now() < end) requestAnimationFrame(look);
    else done([seen.frames, seen.bare, seen.pictures.size]);
  };
  requestAnimationFrame(look);
})"""


def test_picture_does_not_flicker(open_notebook):
    "During training the picture changes a few times, and is present in every frame."
    nb = begin(open_notebook)
    nb.until(lambda: steps(nb) > 5)
    frames, bare, pictures = nb.page.evaluate(FLICKER)
    assert frames > 50 and bare == 0 and pictures >= 3, (frames, bare, pictures)


def test_samples_are_escaped(open_notebook):
    "A script in a prompt, shown as a sample, is text: it does not run, and creates no element."
    evil = "<script>window.evil = 1</script><img src=x onerror='window.evil = 2'>"
    setup = SETUP + f"\nalphabet = ''.join(sorted({{*'abcdefgh', *{evil!r}}}))\nEVIL = {evil!r}"
    start = ("trainer = task(count_a, alphabet, [EVIL], steps=10**6, batch=16, response_length=8,\n"
             "               guards='warn')\nlive = Live(trainer, root=None)\nlive.start()")
    nb = begin(open_notebook, setup=setup, start=start)
    nb.until(lambda: steps(nb) > 3)
    nb.press("Sample")
    nb.page.wait_for_selector("text=after step")
    assert evil in nb.page.inner_text(".jp-Notebook")
    assert nb.page.evaluate("window.evil") is None and not nb.page.query_selector(
        ".widget-html img, .widget-html script"
    )


@pytest.fixture
def bare_server(tmp_path):
    "A JupyterLab without widgets."
    server = Server(tmp_path, disabled=["@jupyter-widgets/jupyterlab-manager"])
    yield server
    server.stop()


def test_without_widgets(bare_server, open_notebook):
    "A JupyterLab without widgets shows a message, and a growing picture with a status line; the cells work."
    nb = begin(open_notebook, "live.pause()", on=bare_server)
    seen = nb.page.inner_text(".jp-Notebook")
    assert "The panel needs the widgets of JupyterLab" in seen and "Error" not in seen and "VBox(" not in seen
    picture = nb.pictures(1)
    nb.until(lambda: nb.pictures(1) != picture)
    assert "running: step" in nb.outputs(1)[1]["data"]["text/plain"]
    nb.run(3)
    assert is_paused(nb) and "paused" in nb.outputs(1)[1]["data"]["text/plain"]
