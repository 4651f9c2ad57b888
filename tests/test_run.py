"""Run directories: names, overwriting, damage, and being killed."""
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx_pretrain  # noqa: F401, I001 - before MLX, as everywhere

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_pretrain.run import (
    LoggingConfig,
    MetricsConfig,
    Run,
    RunError,
    check_name,
    checkpoints,
    is_run,
    load_checkpoint,
    read_metrics,
    write_checkpoint,
)

ARRAYS = {
    "model": {"w": mx.arange(64.0), "b": mx.ones((3, 4)).astype(mx.bfloat16)},
    "optimizer": {"step": mx.array(7, dtype=mx.uint64), "w.m": mx.zeros(64)},
}


def same(a, b):
    assert a.keys() == b.keys()
    for group in a:
        assert a[group].keys() == b[group].keys()
        for name, x in a[group].items():
            assert x.dtype == b[group][name].dtype and x.shape == b[group][name].shape
            assert mx.array_equal(x, b[group][name])


# ---- names

@pytest.mark.parametrize("name", [
    "", ".", "..", ".hidden", "../x", "a/b", "a/../../b", "/etc", "a\\b", "a\nb", "a\0b", "a\tb", " a", "a ",
    "x" * 201, "é" * 101, "\ud800",
])
def test_bad_name_is_one_sentence_and_makes_nothing(name, tmp_path):
    with pytest.raises(RunError) as caught: Run(name, "", root=tmp_path / "runs")
    assert "choose another `name`" in str(caught.value) and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["Llama (2M)", "Llama-2M-SFT", "a", "x" * 200, "模型", "[a] *?", "a..b", "-x", "a.new-12"])
def test_good_name_makes_a_run(name, tmp_path):
    run = Run(name, "name: x\n", root=tmp_path)
    assert run.path == tmp_path / name and is_run(run.path)
    assert os.listdir(tmp_path) == [name]
    assert (run.path / "config.yaml").read_text() == "name: x\n"


@given(st.text(max_size=220))
@settings(deadline=None, max_examples=300)
def test_a_name_that_passes_stays_directly_inside_its_root(name):
    try: check_name(name)
    except RunError: return
    root = Path("/somewhere/runs")
    assert Path(os.path.normpath(root / name)).parent == root
    assert not name.startswith(".") and len(os.fsencode(name)) <= 200


@pytest.mark.parametrize("folder", ["../x", "/tmp", "", ".", "a/b", "model", "tokenizer", "metrics.jsonl"])
def test_folders_of_the_config_are_plain_names(folder):
    for key in ("log_dir", "checkpoint_dir"):
        with pytest.raises(ValueError): LoggingConfig(**{key: folder})


# ---- overwriting

def old_run(root, name="x"):
    run = Run(name, "old", root=root)
    run.log({"step": 1, "loss": 1.0})
    run.save_checkpoint(1, ARRAYS, {})
    run.finish("finished")
    return run.path


def test_without_overwrite_nothing_is_touched(tmp_path):
    path = old_run(tmp_path)
    with pytest.raises(RunError, match="exists already"): Run("x", "new", root=tmp_path)
    assert (path / "config.yaml").read_text() == "old" and os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("make", [
    lambda p: (p.mkdir(), (p / "photo.jpg").write_text("precious")),
    lambda p: p.mkdir(),
    lambda p: p.write_text("a file"),
    lambda p: (p.mkdir(), (p / "metadata.json").write_text("{}")),
    lambda p: (p.mkdir(), (p / "metadata.json").write_text('{"versions": ["mlx_pretrain"]}')),
    lambda p: (p.mkdir(), (p / "metadata.json").write_text("[1]")),
    lambda p: p.symlink_to(old_run(p.parent, "y")),
    lambda p: p.symlink_to(p.parent / "nowhere"),
], ids=["folder", "empty folder", "file", "metadata of others", "versions is a list", "metadata is a list", "link to a run",
        "dangling link"])
def test_overwrite_refuses_what_is_not_a_run(make, tmp_path):
    place = tmp_path / "x"
    make(place)
    def contents(): return sorted(str(p) for p in tmp_path.rglob("*"))
    before = contents()
    with pytest.raises(RunError, match="is not a run directory"): Run("x", "", root=tmp_path, overwrite=True)
    assert contents() == before


def test_old_run_stays_until_the_first_checkpoint_of_the_new_one(tmp_path):
    path = old_run(tmp_path)
    new = Run("x", "new", root=tmp_path, overwrite=True)
    new.log({"step": 1, "loss": 2.0})
    new.note("hello")
    new.metadata(parameters=3)
    assert new.path != path and (path / "config.yaml").read_text() == "old"
    same(load_checkpoint(checkpoints(path)[-1])[0], ARRAYS)
    saved = new.save_checkpoint(5, ARRAYS, {})
    assert new.path == path and saved == path / "checkpoints" / "step_000005"
    assert (path / "config.yaml").read_text() == "new"
    assert checkpoints(path) == [saved] and read_metrics(path) == [{"step": 1, "loss": 2.0}]
    assert os.listdir(tmp_path) == ["x"]
    new.log({"step": 2, "loss": 1.5})
    assert len(read_metrics(path)) == 2


@pytest.mark.parametrize("outcome, who", [("finished", "new"), ("interrupted", "old"), ("failed", "old")])
def test_finish_without_a_checkpoint(outcome, who, tmp_path):
    path = old_run(tmp_path)
    new = Run("x", "new", root=tmp_path, overwrite=True)
    new.finish(outcome)
    assert (path / "config.yaml").read_text() == who
    assert json.loads((new.path / "metadata.json").read_text())["outcome"] == outcome
    Run("x", "newest", root=tmp_path, overwrite=True).finish("finished")
    assert (path / "config.yaml").read_text() == "newest" and os.listdir(tmp_path) == ["x"]


def test_a_place_that_is_taken_meanwhile_is_respected(tmp_path):
    path = old_run(tmp_path)
    new = Run("x", "new", root=tmp_path, overwrite=True)
    path.rename(tmp_path / "y")
    path.mkdir()
    (path / "photo.jpg").write_text("precious")
    with pytest.raises(RunError, match="is not a run directory"): new.save_checkpoint(1, ARRAYS, {})
    assert os.listdir(path) == ["photo.jpg"]
    same(load_checkpoint(checkpoints(new.path)[-1])[0], ARRAYS)


def test_a_swap_that_was_cut_in_two_is_undone(tmp_path):
    path = old_run(tmp_path)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    path.rename(tmp_path / f".x.old-{dead.pid}")
    (tmp_path / f".x.new-{dead.pid}").mkdir()
    with pytest.raises(RunError, match="exists already"): Run("x", "new", root=tmp_path)
    assert (path / "config.yaml").read_text() == "old" and os.listdir(tmp_path) == ["x"]


# ---- metadata, metrics, events

def test_metadata(tmp_path):
    run = Run("x", "", root=tmp_path)
    run.metadata(parameters=5, data={"train": "sha"})
    fields = json.loads((run.path / "metadata.json").read_text())
    assert fields["name"] == "x" and fields["outcome"] == "running" and fields["parameters"] == 5
    assert fields["created"].endswith("+00:00") and set(fields["versions"]) == {"mlx_pretrain", "mlx", "python"}
    assert fields["platform"] and fields["device"]
    run.finish("failed")
    assert json.loads((run.path / "metadata.json").read_text())["outcome"] == "failed"


def test_metrics_are_strict_json_and_nan_is_null(tmp_path):
    run = Run("x", "", root=tmp_path)
    run.log({"step": mx.array(1), "loss": mx.array(math.nan), "grad_norm": np.float32(math.inf), "val_loss": -math.inf,
             "tokens": np.int64(3), "list": [math.nan, 1.0], "tiny": 1e-300, "ok": np.bool_(True)})
    run.event("knob", step=2, name="kl_coef", value=math.nan)
    def refuse(word): raise AssertionError(word)
    lines = [json.loads(line, parse_constant=refuse) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert lines[0] == {"step": 1, "loss": None, "grad_norm": None, "val_loss": None, "tokens": 3, "list": [None, 1.0],
                        "tiny": 1e-300, "ok": True}
    assert lines[1] == {"event": "knob", "step": 2, "name": "kl_coef", "value": None}
    assert read_metrics(run.path) == read_metrics(run.path / "metrics.jsonl") == lines


def test_each_switch_drops_its_metrics_and_no_other(tmp_path):
    everything = {"step": 1, "loss": 1.0, "perplexity": 2.0, "bits_per_byte": 3.0, "val_loss": 1.0, "val_perplexity": 1.0,
                  "learning_rate": 1.0, "tokens": 1, "tokens_per_second": 1.0, "reward": 1.0, "kl": 1.0, "grad_norm": 1.0,
                  "val_reward": 1.0, "val_kl": 1.0}
    dropped = {}
    for switch in MetricsConfig.model_fields:
        run = Run(switch, "", root=tmp_path, logging=LoggingConfig(metrics=MetricsConfig(**{switch: False})))
        run.log(everything)
        dropped[switch] = set(everything) - set(read_metrics(run.path)[0])
    assert dropped == {
        "log_loss": {"loss", "val_loss"}, "log_perplexity": {"perplexity", "val_perplexity"},
        "log_tokens_per_second": {"tokens_per_second"}, "log_learning_rate": {"learning_rate"},
        "log_tokens_processed": {"tokens"}, "log_rewards": {"reward", "val_reward"},
        "log_kl_divergence": {"kl", "val_kl"}}


def test_a_torn_last_line_is_left_out_wherever_it_was_cut(tmp_path):
    rows = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.25, "text": "zwölf\u2028"}]
    data = b"".join((json.dumps(row, ensure_ascii=False) + "\n").encode() for row in rows)
    first = data.index(b"\n") + 1
    file = tmp_path / "metrics.jsonl"
    for cut in range(first, len(data) + 1):
        file.write_bytes(data[:cut])
        assert read_metrics(tmp_path) == (rows if cut >= len(data) - 1 else rows[:1])
    for cut in range(first - 1):
        file.write_bytes(data[:cut])
        assert read_metrics(tmp_path) == []


def test_a_bad_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2\n{"step": 3}\n')
    with pytest.raises(RunError, match="line 2"): read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n[2]\n')
    with pytest.raises(RunError, match="line 2"): read_metrics(tmp_path)
    with pytest.raises(RunError, match="does not exist"): read_metrics(tmp_path / "none")


# ---- damage

def test_checkpoint_comes_back_as_it_went(tmp_path):
    saved = write_checkpoint(tmp_path, 12, ARRAYS, {"cursor": [1, 2.5, None, "x"]})
    arrays, state = load_checkpoint(saved)
    same(arrays, ARRAYS)
    assert state == {"cursor": [1, 2.5, None, "x"], "step": 12}
    assert sorted(os.listdir(saved)) == ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]
    assert os.listdir(tmp_path) == ["step_000012"]


def test_loaded_arrays_outlive_their_file(tmp_path):
    saved = write_checkpoint(tmp_path, 1, ARRAYS, {})
    arrays, _ = load_checkpoint(saved)
    for file in saved.iterdir(): file.write_bytes(b"")
    same(arrays, ARRAYS)


def test_one_flipped_bit_anywhere_is_found(tmp_path):
    saved = write_checkpoint(tmp_path, 1, {"a": {"w": mx.arange(4.0)}, "c": {"w": mx.ones(4)}}, {"seed": 0})
    tried = 0
    for file in sorted(saved.iterdir()):
        data = file.read_bytes()
        for at in range(len(data)):
            bad = bytearray(data)
            bad[at] ^= 1 << (at % 8)
            file.write_bytes(bad)
            with pytest.raises(RunError, match=f"{file.name}|is missing|is damaged"): load_checkpoint(saved)
            tried += 1
        file.write_bytes(data)
    load_checkpoint(saved)
    assert tried == sum(file.stat().st_size for file in saved.iterdir()) > 400


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_a_truncated_or_missing_file_is_named(name, tmp_path):
    saved = write_checkpoint(tmp_path, 1, ARRAYS, {})
    file = saved / name
    data = file.read_bytes()
    for keep in (0, 1, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:keep])
        with pytest.raises(RunError, match=f"{name} is damaged"): load_checkpoint(saved)
    file.unlink()
    with pytest.raises(RunError, match=f"{name} is missing"): load_checkpoint(saved)
    assert not isinstance(RunError("x"), (OSError, ValueError))


def test_a_swapped_file_and_a_forged_manifest_are_found_and_strangers_ignored(tmp_path):
    one, two = (write_checkpoint(tmp_path, i, {"model": {"w": mx.full((4,), i)}}, {}) for i in (1, 2))
    (one / ".DS_Store").write_text("Finder was here")
    load_checkpoint(one)
    (one / "model.safetensors").write_bytes((two / "model.safetensors").read_bytes())
    with pytest.raises(RunError, match="model.safetensors is damaged"): load_checkpoint(one)
    for forged in ("{}", "[]", "null", '{"state.json": 1, "state.json": 2}', "[" * 10):
        (two / "manifest.json").write_text(forged)
        with pytest.raises(RunError, match="manifest.json is damaged"): load_checkpoint(two)


def test_steps_are_ordered_as_numbers(tmp_path):
    for step in (1_000_000, 999_999, 5): write_checkpoint(tmp_path / "checkpoints", step, {"m": {}}, {})
    (tmp_path / "checkpoints" / "step_x").mkdir()
    assert [int(p.name.removeprefix("step_")) for p in checkpoints(tmp_path)] == [5, 999_999, 1_000_000]


def test_the_same_step_again_replaces_a_damaged_one(tmp_path):
    saved = write_checkpoint(tmp_path, 1, ARRAYS, {})
    (saved / "state.json").unlink()
    same(load_checkpoint(write_checkpoint(tmp_path, 1, ARRAYS, {}))[0], ARRAYS)
    assert os.listdir(tmp_path) == ["step_000001"]


FULL_DISK = """
import resource, signal, sys
import mlx_pretrain
import mlx.core as mx
from mlx_pretrain.run import RunError, write_checkpoint, load_checkpoint
one = write_checkpoint(sys.argv[1], 1, {"model": {"w": mx.zeros(10)}}, {})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)                # files may not grow beyond 1 MB: as if the disk were full
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
try: write_checkpoint(sys.argv[1], 2, {"model": {"w": mx.zeros(1_000_000)}}, {})
except RunError as e: print(e)
load_checkpoint(one)
"""


def test_a_full_disk_is_one_sentence_and_leaves_nothing_behind(tmp_path):
    out = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=True, timeout=60).stdout
    assert "step_000002 could not be written" in out and out.count("\n") == 1
    assert os.listdir(tmp_path) == ["step_000001"]


# ---- killed while writing

WRITER = """
import sys
from pathlib import Path
import mlx_pretrain
import mlx.core as mx
from mlx_pretrain import run as R
how, root, first = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
if how == "in place":                                        # the negative control: the same files, under their final name from the start
    def write(folder, step, arrays, state): R._fill(folder / f"step_{step:06d}", arrays, {**state, "step": step})
else: write = R.write_checkpoint
arrays = {g: {str(i): mx.full((500_000,), i) for i in range(4)} for g in ("model", "optimizer")}     # 16 MB
mx.eval(arrays)
print("ready", flush=True)
for step in range(first, first + 1000): write(root / "checkpoints", step, arrays, {"seed": 0})
"""


def half_written(folder: Path) -> list[Path]:
    "Folders that have a first file but not yet a manifest."
    return [p for p in folder.glob("*") if p.is_dir() and any(p.iterdir()) and not (p / "manifest.json").exists()]


def stopped_in_the_middle(pid: int, folder: Path) -> bool:
    "Let the writer go on for a moment, then hold it: is it in the middle of a checkpoint?"
    os.kill(pid, signal.SIGCONT)
    time.sleep(0.003)
    os.kill(pid, signal.SIGSTOP)
    assert os.WIFSTOPPED(os.waitpid(pid, os.WUNTRACED)[1])
    return bool(half_written(folder))


def kill_a_writer(how: str, root: Path, first: int, after: float | None) -> None:
    "Kill a writer after some seconds, or in the middle of a checkpoint; with the signal that nobody can catch."
    writer = subprocess.Popen([sys.executable, "-c", WRITER, how, str(root), str(first)], stdout=subprocess.PIPE, text=True)
    try:
        assert writer.stdout.readline() == "ready\n"
        if after is not None: time.sleep(after)
        else: assert any(stopped_in_the_middle(writer.pid, root / "checkpoints") for _ in range(2000)), "never in the middle"
        assert writer.poll() is None
    finally:
        writer.kill()
        writer.wait()
        writer.stdout.close()


def bad_checkpoints(root: Path) -> list[str]:
    bad = []
    for path in checkpoints(root):
        try: load_checkpoint(path)
        except RunError as e: bad.append(str(e))
    return bad


def test_killed_while_writing_leaves_no_bad_checkpoint(tmp_path):
    rng = random.Random(0)
    interrupted = 0
    for kill, after in enumerate([None, None, *(rng.uniform(0.0, 0.3) for _ in range(4))]):
        kill_a_writer("atomic", tmp_path, kill * 1000, after)
        interrupted += bool(half_written(tmp_path / "checkpoints"))
        assert bad_checkpoints(tmp_path) == []
        for path in [*checkpoints(tmp_path)[:-1], *(tmp_path / "checkpoints").glob(".step*")]: shutil.rmtree(path)
    assert interrupted >= 2
    assert len(checkpoints(tmp_path)) == 1


def test_the_killer_would_notice_a_writer_in_place(tmp_path):
    kill_a_writer("in place", tmp_path, 0, None)
    assert len(bad_checkpoints(tmp_path)) == 1


SWAPPER = """
import sys, time
import mlx_pretrain
from mlx_pretrain.run import Run
run = Run("x", "new", root=sys.argv[1], overwrite=True)
run.log({"step": 1, "loss": 1.0})
print("ready", flush=True)
time.sleep(60)
"""


def test_killed_before_its_first_checkpoint_costs_the_old_run_nothing(tmp_path):
    path = old_run(tmp_path)
    child = subprocess.Popen([sys.executable, "-c", SWAPPER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n"
    Run("x", "me", root=tmp_path, overwrite=True)                # the other one is alive: its folder is left alone
    assert (tmp_path / f".x.new-{child.pid}" / "metrics.jsonl").exists()
    child.kill()
    child.wait()
    child.stdout.close()
    assert (path / "config.yaml").read_text() == "old"
    same(load_checkpoint(checkpoints(path)[-1])[0], ARRAYS)
    Run("x", "me", root=tmp_path, overwrite=True).finish("finished")
    assert (path / "config.yaml").read_text() == "me" and os.listdir(tmp_path) == ["x"]
