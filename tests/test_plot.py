"Figures show what was logged: positions, values and names are read from the artists, not from pixels."
import os
import warnings

import mlx_pretrain  # noqa: F401, I001 (before MLX)

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_pretrain.config import UserError
from mlx_pretrain.plot import plot_lengths, plot_reward_kl, plot_runs, plot_schedule, save_figure
from mlx_pretrain.rows import SFTDataset
from mlx_pretrain.run import Run, read_metrics
from mlx_pretrain.session import log_metrics
from mlx_pretrain.trainer import Trainer, TrainingConfig


def logged(path, *rows):
    "A run directory with these lines of metrics."
    run = Run(path.name, "", root=path.parent)
    for row in rows: run.log(row)
    run.finish("finished")
    return path


def legend(figure): return [text.get_text() for text in figure.legends[0].get_texts()]


def dotted(axes): return [line.get_xdata()[0] for line in axes.get_lines() if line.get_linestyle() == ":"]


def trained(run, turn, every=1, steps=40, **scheduler):
    "Fit one number, at 8 tokens per step, and call `turn` after each step."
    def loss(model, batch): return mx.square(model.weight - batch).sum(), mx.array(8)
    trainer = Trainer(nn.Linear(1, 1, bias=False), loss, lambda step: mx.array([[1.0]]), steps,
                      TrainingConfig(scheduler=scheduler), run=run, callbacks=[log_metrics(run, every), turn])
    trainer.run()
    run.finish("finished")
    return trainer


def test_plot_schedule_matches_the_logged_rates(tmp_path):
    "Red if steps are counted from 0, or the rate of another step is drawn."
    run = Run("run", "", root=tmp_path)
    trainer = trained(run, lambda trainer, metrics: None, type="wsd", warmup_steps=7)
    rates = [row["learning_rate"] for row in read_metrics(run.path)]
    for figure in (plot_schedule(trainer.schedule, trainer.total_steps),
                   plot_schedule(TrainingConfig(scheduler={"type": "wsd", "warmup_steps": 7}), 40)):
        line, dot = figure.axes[0].get_lines()
        assert line.get_xdata().tolist() == [row["step"] for row in read_metrics(run.path)] == [*range(1, 41)]
        assert line.get_ydata() == pytest.approx(rates)
        assert dot.get_xydata().tolist() == [[7, max(rates)]]


def test_knob_change_is_drawn_at_its_step(tmp_path):
    "Between two logged lines. Red if it is drawn at one of them, or at its step on an axis of tokens."
    def turn(trainer, metrics):
        if metrics["step"] in (13, 25): trainer.knobs.learning_rate_factor = metrics["step"] / 100
    run = Run("run", "", root=tmp_path)
    trained(run, turn, every=10)
    figure = plot_runs([run.path])
    axes = figure.axes[0]
    assert axes.get_xlabel() == "tokens seen" and dotted(axes) == pytest.approx([13 * 8, 25 * 8])
    labels = [text.get_text() for text in axes.texts]
    assert labels == ["learning_rate_factor 0.13", "learning_rate_factor 0.25"]


def test_rapid_knob_changes_are_one_mark(tmp_path):
    "Red if each event is drawn, if the label has the first value, or if slow changes become one mark."
    turns = {"fast": {50: 1, 51: 2, 52: 3}, "slow": {step: step for step in range(10, 90, 2)}}
    for name, values in turns.items():
        run = Run(name, "", root=tmp_path)
        for step in range(1, 101):
            run.log({"step": step, "loss": 1.0})
            if step in values: run.log_event("knob", step, name="kl_coef", value=values[step])
        run.finish("finished")
    fast, slow = (plot_runs([tmp_path / name]).axes[0] for name in turns)
    assert dotted(fast) == [52] and [text.get_text() for text in fast.texts] == ["kl_coef 3"]
    assert 5 < len(dotted(slow)) < 20 and all(text.get_text() == f"kl_coef {text.xy[0]:g}"
                                              for text in slow.texts)


def test_labels_of_knob_changes_do_not_overlap(tmp_path):
    "Red if the labels of two runs changed at the same step are in the same place."
    for name in ("a", "b", "c"):
        run = Run(name, "", root=tmp_path)
        for step in range(1, 101):
            run.log({"step": step, "loss": 1.0})
            if step in (1, 50, 100): run.log_event("knob", step, name="kl_coef", value=0.5)
        run.finish("finished")
    figure = plot_runs([tmp_path / name for name in ("a", "b", "c")])
    save_figure(figure, tmp_path / "a.png")
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(dotted(figure.axes[0])) == 9 and len(boxes) == 6
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_legend_names_each_run_once_and_literally(tmp_path):
    "Red if the legend repeats a name, two runs share one, or a name is parsed as a formula or hidden."
    rows = [{"step": step, "tokens": step, "loss": 1.0, "val_loss": 1.0} for step in (1, 2)]
    places = [logged(tmp_path / name, *rows) for name in ("a/run", "b/run", "_x", "$^$", "other")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = plot_runs([*places, str(places[0]), places[1] / "metrics.jsonl",
                            tmp_path / "a" / ".." / "_x"])
        save_figure(figure, tmp_path / "a.png")
    assert legend(figure) == ["a/run", "b/run", "_x", r"\$^\$", "other", "training", "validation"]


def test_run_name_that_is_not_utf8_is_drawn(tmp_path):
    path = logged(tmp_path / "run", *({"step": step, "tokens": step, "loss": 1.0} for step in (1, 2)))
    os.rename(path, odd := tmp_path / os.fsdecode(b"r\xff"))
    figure = plot_runs([odd])
    save_figure(figure, tmp_path / "a.png")
    assert legend(figure) == [r"r\udcff"]


@pytest.mark.parametrize("n", [1, 2, 5, 10])
def test_legend_is_outside_the_panels_and_in_the_figure(tmp_path, n):
    "Red if names of ordinary length are cut off, or cover curves."
    runs = [logged(tmp_path / f"smollm2-135m-sft-seed{i}", {"step": 1, "reward": 1.0, "kl": 1.0})
            for i in range(n)]
    for figure in (plot_runs(runs), plot_reward_kl(runs)):
        save_figure(figure, tmp_path / "a.png")
        box = figure.legends[0].get_window_extent()
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0
        assert all(box.y1 <= axes.get_window_extent().y0 for axes in figure.axes)
        assert len({line.get_color() for line in figure.legends[0].get_lines()} - {"0.4"}) == n


def test_reward_against_kl_with_incomplete_metrics(tmp_path):
    "Only validations, or lines with one of the two. Red if a half point is drawn, or none is an error."
    val = logged(tmp_path / "val", {"step": 0, "val_kl": 0.0, "val_reward": 0.1},
                 {"step": 9, "val_kl": 2.0, "val_reward": 0.5})
    half = logged(tmp_path / "half", {"step": 1, "kl": 1.0, "reward": 0.5},
                  {"step": 2, "kl": None, "reward": 0.7}, {"step": 3, "kl": 2.0})
    figure = plot_reward_kl([val, half])
    (points,), lines = figure.axes[0].collections, {line.get_label(): line.get_xydata().tolist()
                                                    for line in figure.axes[0].get_lines()}
    assert points.get_offsets().tolist() == lines["last step"] == [[1.0, 0.5]]
    assert lines["validation"] == [[0.0, 0.1], [2.0, 0.5]]
    bare = logged(tmp_path / "bare", {"step": 1, "reward": 1.0})
    with pytest.raises(UserError, match="bare has logged no reward with a KL"): plot_reward_kl([val, bare])


def test_lengths_are_counted_per_row():
    "Two answers in a row add up. Red if trained tokens are shifted by a row or a bar."
    mask = np.array([0, 1, 1, 0, 0, 1, 0, 0, 0, 1, 1, 1], bool)
    rows = SFTDataset(np.arange(12, dtype=np.uint16), mask, np.array([0, 3, 7, 12]), np.array([1, 2, 2]), 0,
                      {"rows": 5, "dropped": 2})
    figure = plot_lengths(rows, context=4)
    total, answer = (bars.get_data() for bars in figure.axes[0].patches)
    assert dict(zip(total.edges + 0.5, total.values)) == {0: 0, 1: 0, 2: 0, 3: 1, 4: 1, 5: 1}
    assert dict(zip(answer.edges + 0.5, answer.values)) == {0: 0, 1: 1, 2: 1, 3: 1, 4: 0, 5: 0}
    assert "5 rows, 3 kept, 2 dropped" in figure.axes[0].get_title()
    assert legend(figure)[2:] == ["median: 4", "95th percentile: 5",
                                  "context of 4: 33.3% of the rows are longer"]


def test_long_title_stays_in_the_figure(tmp_path):
    "Red if all row counts are in one line."
    source = dict.fromkeys(("rows", "truncated", "dropped", "filtered", "skipped"), 10_000_000)
    figure = plot_lengths(SFTDataset(np.zeros(9, np.uint16), np.ones(9, bool), np.array([0, 9]),
                                     np.array([1]), 0, source))
    save_figure(figure, tmp_path / "a.png")
    assert figure.axes[0].title.get_window_extent().x0 >= 0
