"""Run directories: names, overwriting, locks, damage, resuming, and being killed."""
import errno
import fcntl
import inspect
import json
import logging
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import mlx_pretrain  # noqa: F401, I001 - before MLX, as everywhere

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_pretrain import checkpoint as C, core, run as R
from mlx_pretrain.checkpoint import Checkpoint, load_checkpoint, write_checkpoint
from mlx_pretrain.config import ConfigError, load_config
from mlx_pretrain.run import (
    LoggingConfig, MetricsConfig, ResumeConfig, Run, RunError, changed_keys, check_name, check_place,
    checkpoints, find_checkpoint, is_run, latest_checkpoint, list_runs, read_metrics, runs_table)

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
def test_bad_name_is_an_error_and_creates_nothing(name, tmp_path):
    with pytest.raises(RunError) as caught: Run(name, "", root=tmp_path / "runs")
    assert "choose another `name`" in str(caught.value) and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name",
                         ["Llama (2M)", "Llama-2M-SFT", "a", "x" * 200, "模型", "[a] *?", "a..b", "-x",
                          "a.new-12"])
def test_valid_name_creates_a_run(name, tmp_path):
    run = Run(name, "name: x\n", root=tmp_path)
    run.close()
    assert run.path == tmp_path / name and is_run(run.path)
    assert os.listdir(tmp_path) == [name]
    assert (run.path / "config.yaml").read_text() == "name: x\n"


@given(st.text(max_size=220))
@settings(deadline=None, max_examples=300)
def test_valid_name_is_a_direct_child_of_its_root(name):
    try: check_name(name)
    except RunError: return
    root = Path("/somewhere/runs")
    assert Path(os.path.normpath(root / name)).parent == root
    assert not name.startswith(".") and len(os.fsencode(name)) <= 200


@pytest.mark.parametrize("folder, problem", [
    ("../x", "contains a slash"), ("/tmp", "contains a slash"), ("a/b", "contains a slash"),
    ("a\\b", "contains a slash"), ("", "is empty"),
    (".", "begins with a dot"), (".step", "begins with a dot"), (" a", "white space"), ("a\n", "white space"),
    ("x" * 300, "300 bytes"),
    *((name, "another part of the run") for name in ("model", "Model", "adapters", "tokenizer",
                                                     "metrics.jsonl", "config.yaml",
                                                     "Config.YAML", "metadata.json", "curve.png")),
])
def test_configured_folders_must_be_plain_and_not_reserved(folder, problem, tmp_path):
    for key in ("log_dir", "checkpoint_dir"):
        (tmp_path / "c.yaml").write_text(json.dumps({key: folder}))
        with pytest.raises(ConfigError, match=problem) as caught:
            load_config(LoggingConfig, tmp_path / "c.yaml")
        assert key in str(caught.value) and str(caught.value).count("\n") == 0


@pytest.mark.parametrize("values, problem", [
    ({"keep_last": 0}, "keep_last"), ({"keep_last": -1}, "keep_last"), ({"keep_last": 2.5}, "keep_last"),
    ({"log_dir": "a", "checkpoint_dir": "a"}, "both 'a'"), ({"log_dir": "Checkpoints"}, "both 'Checkpoints'"),
])
def test_logging_config_errors(values, problem, tmp_path):
    (tmp_path / "c.yaml").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=problem) as caught: load_config(LoggingConfig, tmp_path / "c.yaml")
    assert str(caught.value).count("\n") == 0


# ---- overwriting

def old_run(root, name="x"):
    run = Run(name, "old", root=root)
    run.log({"step": 1, "loss": 1.0})
    run.save_checkpoint(1, ARRAYS, {})
    run.finish("finished")
    return run.path


def test_without_overwrite_nothing_changes(tmp_path):
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
], ids=["folder", "empty folder", "file", "metadata of others", "versions is a list", "metadata is a list",
        "link to a run",         "dangling link"])
def test_overwrite_refuses_what_is_not_a_run(make, tmp_path):
    place = tmp_path / "x"
    make(place)
    def contents(): return sorted(str(p) for p in tmp_path.rglob("*"))
    before = contents()
    for overwrite in (True, False):
        with pytest.raises(RunError, match="exists already and is not a run directory"):
            Run("x", "", root=tmp_path, overwrite=overwrite)
    assert contents() == before


def test_old_run_is_kept_until_first_checkpoint_of_new_run(tmp_path):
    path = old_run(tmp_path)
    new = Run("x", "new", root=tmp_path, overwrite=True)
    new.log({"step": 1, "loss": 2.0})
    new.log_text("hello")
    new.update_metadata(parameters=3)
    assert new.path != path and (path / "config.yaml").read_text() == "old"
    same(load_checkpoint(checkpoints(path)[-1])[0], ARRAYS)
    saved = new.save_checkpoint(5, ARRAYS, {})
    assert new.path == path and saved == path / "checkpoints" / "step_000005"
    assert (path / "config.yaml").read_text() == "new"
    assert checkpoints(path) == [saved] and read_metrics(path) == [{"step": 1, "loss": 2.0}]
    assert sorted(os.listdir(tmp_path)) == [".x.lock", "x"]
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


def test_directory_created_meanwhile_is_not_replaced(tmp_path):
    path = old_run(tmp_path)
    new = Run("x", "new", root=tmp_path, overwrite=True)
    path.rename(tmp_path / "y")
    path.mkdir()
    (path / "photo.jpg").write_text("precious")
    with pytest.raises(RunError, match="is not a run directory"): new.save_checkpoint(1, ARRAYS, {})
    assert os.listdir(path) == ["photo.jpg"]
    same(load_checkpoint(checkpoints(new.path)[-1])[0], ARRAYS)


def test_directory_created_during_replacement_is_not_replaced(tmp_path, monkeypatch):
    check = R.check_place
    old = old_run(tmp_path, "y")
    waiting = Run("y", "new", root=tmp_path, overwrite=True)
    def photos(final, overwrite):
        check(final, overwrite)
        shutil.rmtree(old)
        old.mkdir()
        (old / "photo.jpg").write_text("precious")
    monkeypatch.setattr(R, "check_place", photos)
    with pytest.raises(RunError, match="y could not be written"): waiting.finish("finished")
    assert os.listdir(old) == ["photo.jpg"]


def test_interrupted_replacement_is_undone(tmp_path):
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
    run.update_metadata(parameters=5, data={"train": "sha"})
    fields = json.loads((run.path / "metadata.json").read_text())
    assert fields["name"] == "x" and fields["outcome"] == "running" and fields["parameters"] == 5
    assert fields["created"].endswith("+00:00") and set(fields["versions"]) == {
        "mlx_pretrain",
        "mlx",
        "python",
    }
    assert fields["platform"] and fields["device"]
    run.finish("failed")
    assert json.loads((run.path / "metadata.json").read_text())["outcome"] == "failed"


def test_metrics_are_strict_json_and_nan_is_null(tmp_path):
    run = Run("x", "", root=tmp_path)
    run.log({"step": mx.array(1), "loss": mx.array(math.nan), "grad_norm": np.float32(math.inf),
             "val_loss": -math.inf, "tokens": np.int64(3), "list": [math.nan, 1.0], "tiny": 1e-300,
             "ok": np.bool_(True)})
    run.log_event("knob", step=2, name="kl_coef", value=math.nan)
    def refuse(word): raise AssertionError(word)
    lines = [json.loads(line, parse_constant=refuse)
             for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert lines[0] == {"step": 1, "loss": None, "grad_norm": None, "val_loss": None, "tokens": 3,
                        "list": [None, 1.0], "tiny": 1e-300, "ok": True}
    assert lines[1] == {"event": "knob", "step": 2, "name": "kl_coef", "value": None}
    assert read_metrics(run.path) == read_metrics(run.path / "metrics.jsonl") == lines


def test_each_switch_removes_only_its_metrics(tmp_path):
    everything = {"step": 1, "loss": 1.0, "perplexity": 2.0, "bits_per_byte": 3.0, "val_loss": 1.0,
                  "val_perplexity": 1.0, "learning_rate": 1.0, "tokens": 1, "tokens_per_second": 1.0,
                  "reward": 1.0, "kl": 1.0, "grad_norm": 1.0, "val_reward": 1.0, "val_kl": 1.0}
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


def test_incomplete_last_line_is_skipped_wherever_it_was_cut(tmp_path):
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


def test_bad_line_in_the_middle_is_reported(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2\n{"step": 3}\n')
    with pytest.raises(RunError, match="line 2"): read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n[2]\n')
    with pytest.raises(RunError, match="line 2"): read_metrics(tmp_path)
    with pytest.raises(RunError, match="does not exist"): read_metrics(tmp_path / "none")


# ---- damage

def test_checkpoint_round_trip(tmp_path):
    saved = write_checkpoint(tmp_path, 12, ARRAYS, {"cursor": [1, 2.5, None, "x"]})
    arrays, state = load_checkpoint(saved)
    same(arrays, ARRAYS)
    assert state == {"cursor": [1, 2.5, None, "x"], "step": 12}
    assert sorted(os.listdir(saved)) == ["manifest.json", "model.safetensors", "optimizer.safetensors",
                                         "state.json"]
    assert os.listdir(tmp_path) == ["step_000012"]


def test_loaded_arrays_do_not_depend_on_their_file(tmp_path):
    saved = write_checkpoint(tmp_path, 1, ARRAYS, {})
    arrays, _ = load_checkpoint(saved)
    for file in saved.iterdir(): file.write_bytes(b"")
    same(arrays, ARRAYS)


def test_any_flipped_bit_is_detected(tmp_path):
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


@pytest.mark.parametrize("name",
                         ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_truncated_or_missing_file_is_reported(name, tmp_path):
    saved = write_checkpoint(tmp_path, 1, ARRAYS, {})
    file = saved / name
    data = file.read_bytes()
    for keep in (0, 1, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:keep])
        with pytest.raises(RunError, match=f"{name} is damaged"): load_checkpoint(saved)
    file.unlink()
    with pytest.raises(RunError, match=f"{name} is missing"): load_checkpoint(saved)
    assert not isinstance(RunError("x"), (OSError, ValueError))


def test_swapped_file_and_forged_manifest_are_detected_and_unlisted_files_ignored(tmp_path):
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


def test_saving_the_same_step_replaces_a_damaged_checkpoint(tmp_path):
    saved = write_checkpoint(tmp_path, 1, ARRAYS, {})
    (saved / "state.json").unlink()
    same(load_checkpoint(write_checkpoint(tmp_path, 1, ARRAYS, {}))[0], ARRAYS)
    assert os.listdir(tmp_path) == ["step_000001"]


def test_leftovers_of_a_dead_process_with_our_pid_are_replaced(tmp_path):
    "In a container every process may have the same id."
    saved = write_checkpoint(tmp_path, 1, ARRAYS, {})
    for kind in ("old", "new"):
        (tmp_path / f".step_000001.{kind}-{os.getpid()}").mkdir()
        (tmp_path / f".step_000001.{kind}-{os.getpid()}" / "state.json").touch()
    write_checkpoint(tmp_path, 1, ARRAYS, {"again": 1})
    assert load_checkpoint(saved)[1]["again"] == 1 and os.listdir(tmp_path) == ["step_000001"]


FULL_DISK = """
import resource, signal, sys
import mlx_pretrain
import mlx.core as mx
from mlx_pretrain.checkpoint import RunError, write_checkpoint, load_checkpoint
one = write_checkpoint(sys.argv[1], 1, {"model": {"w": mx.zeros(10)}}, {})
# files may not grow beyond 1 MB: as if the disk were full
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
try: write_checkpoint(sys.argv[1], 2, {"model": {"w": mx.zeros(1_000_000)}}, {})
except RunError as e: print(e)
load_checkpoint(one)
"""


def test_full_disk_is_an_error_and_leaves_no_files(tmp_path):
    out = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True,
                         check=True, timeout=60).stdout
    assert "step_000002 could not be written" in out and out.count("\n") == 1
    assert os.listdir(tmp_path) == ["step_000001"]


# ---- killed while writing

WRITER = """
import sys
from pathlib import Path
import mlx_pretrain
import mlx.core as mx
from mlx_pretrain import checkpoint as C
how, root, first = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
if how == "in place":                                        # planted bug: written to the final path
    def write(folder, step, arrays, state):
        C.write_checkpoint_files(folder / f"step_{step:06d}", arrays, {**state, "step": step})
else: write = C.write_checkpoint
arrays = {g: {str(i): mx.full((500_000,), i) for i in range(4)} for g in ("model", "optimizer")}     # 16 MB
mx.eval(arrays)
print("ready", flush=True)
for step in range(first, first + 1000): write(root / "checkpoints", step, arrays, {"seed": 0})
"""


def half_written(folder: Path) -> list[Path]:
    "Folders that have a file but no manifest yet."
    return [p for p in folder.glob("*") if p.is_dir() and any(p.iterdir())
            and not (p / "manifest.json").exists()]


def stopped_in_the_middle(pid: int, folder: Path) -> bool:
    "Continue the writer for a moment, then stop it; whether it is in the middle of a checkpoint."
    os.kill(pid, signal.SIGCONT)
    time.sleep(0.003)
    os.kill(pid, signal.SIGSTOP)
    assert os.WIFSTOPPED(os.waitpid(pid, os.WUNTRACED)[1])
    return bool(half_written(folder))


def kill_a_writer(how: str, root: Path, first: int, after: float | None) -> None:
    "Kill a writer with SIGKILL after some seconds, or in the middle of a checkpoint."
    writer = subprocess.Popen([sys.executable, "-c", WRITER, how, str(root), str(first)],
                              stdout=subprocess.PIPE, text=True)
    try:
        assert writer.stdout.readline() == "ready\n"
        if after is not None: time.sleep(after)
        else:
            assert any(stopped_in_the_middle(writer.pid, root / "checkpoints")
                       for _ in range(2000)), "never in the middle"
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
        for path in [*checkpoints(tmp_path)[:-1], *(tmp_path / "checkpoints").glob(".step*")]:
            shutil.rmtree(path)
    assert interrupted >= 2
    assert len(checkpoints(tmp_path)) == 1


def test_planted_in_place_writer_is_detected(tmp_path):
    kill_a_writer("in place", tmp_path, 0, None)
    assert len(bad_checkpoints(tmp_path)) == 1


# ---- one writer at a time

def start(script: str, *args) -> subprocess.Popen:
    "Start a script and wait for its first line."
    child = subprocess.Popen([sys.executable, "-c", "import mlx_pretrain\n" + script, *map(str, args)],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n"
    return child


def kill(child: subprocess.Popen) -> str:
    "Kill it with SIGKILL; returns its output."
    child.kill()
    return child.communicate(timeout=60)[0]


WRITER_OF_X = """
import sys
from mlx_pretrain.run import Run
run = Run("x", "theirs", root=sys.argv[1], overwrite=True)
run.log({"step": 1, "loss": 1.0})
print("ready", flush=True)
sys.stdin.read()
"""


def test_second_process_cannot_write_and_lock_ends_with_its_holder(tmp_path):
    saved = Checkpoint(path := checkpoints(old_run(tmp_path))[-1], *load_checkpoint(path))
    child = start(WRITER_OF_X, tmp_path)
    for what in (
        lambda: Run("x", "me", root=tmp_path), lambda: Run("x", "me", root=tmp_path, overwrite=True),
        lambda: Run.resume(saved, "x", "me", root=tmp_path), lambda: check_place(tmp_path / "x", True),
        lambda: check_place(tmp_path / "x", False),
        lambda: find_checkpoint(ResumeConfig(checkpoint="latest"), tmp_path / "x"),
        lambda: find_checkpoint(ResumeConfig(checkpoint=str(saved.path)), tmp_path / "x"),
    ):
        with pytest.raises(
            RunError, match=f"process {child.pid} is writing .*x; stop it, or choose another `name`"
        ):
            what()
    assert (tmp_path / f".x.new-{child.pid}" / "metrics.jsonl").exists()
    Run("y", "me", root=tmp_path).close()                        # another name is free
    find_checkpoint(ResumeConfig(checkpoint=str(saved.path)), tmp_path / "y")
    kill(child)
    assert (tmp_path / "x" / "config.yaml").read_text() == "old"
    same(latest_checkpoint(tmp_path / "x").arrays, ARRAYS)
    Run("x", "me", root=tmp_path, overwrite=True).finish("finished")
    assert (tmp_path / "x" / "config.yaml").read_text() == "me" and sorted(os.listdir(tmp_path)) == ["x", "y"]


RACER = """
import fcntl, os, sys, time
from mlx_pretrain import run as R
if sys.argv[2] == "no lock": fcntl.flock = lambda *_: None
print("ready", flush=True)
sys.stdin.readline()
try:
    run = R.Run("x", str(os.getpid()), root=sys.argv[1], overwrite=True)
    for i in range(1, 30): run.log({"step": i, "pid": os.getpid()}); time.sleep(0.002)
    run.save_checkpoint(1, {}, {"pid": os.getpid()})
    print("won", flush=True)
    sys.stdin.read()
except R.RunError as e: print(str(e), flush=True)
"""


def race(root: Path, how: str) -> list[str]:
    "Three processes overwrite one run concurrently; returns the output of each."
    children = [start(RACER, root, how) for _ in range(3)]
    for child in children: child.stdin.write("go\n"); child.stdin.flush()
    outputs = [child.stdout.readline() for child in children]
    for child in children: kill(child)
    return outputs


def one_wins(outputs: list[str]) -> bool:
    return outputs.count("won\n") == 1 and sum("is writing" in text for text in outputs) == 2


def test_of_concurrent_overwriting_runs_exactly_one_succeeds(tmp_path):
    path = old_run(tmp_path)
    assert one_wins(race(tmp_path, "lock"))
    winner = (path / "config.yaml").read_text()
    assert {str(row["pid"])
            for row in read_metrics(path)} == {winner} and str(latest_checkpoint(path).state["pid"]) == winner


def test_planted_missing_lock_is_detected(tmp_path):
    old_run(tmp_path)
    assert not one_wins(race(tmp_path, "no lock"))


CHILDREN = """
import os, subprocess, sys, time
from mlx_pretrain.run import Run
run = Run("x", "theirs", root=sys.argv[1])
if sys.argv[2] == "fork":
    child = os.fork()
    if child == 0: time.sleep(60); os._exit(0)
else:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], close_fds=False,
                             stdout=subprocess.DEVNULL).pid
time.sleep(0.2)
print("ready", child, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_child_processes_do_not_keep_the_lock_of_a_dead_parent(how, tmp_path):
    parent = subprocess.Popen([sys.executable, "-c", "import mlx_pretrain\n" + CHILDREN, str(tmp_path), how],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline().split()[1])
    try:
        with pytest.raises(RunError, match=f"process {parent.pid} is writing"):
            check_place(tmp_path / "x", True)
        parent.kill()
        parent.wait()
        os.kill(child, 0)                                        # it lives
        Run("x", "me", root=tmp_path).close()
    finally:
        os.kill(child, signal.SIGKILL)
        parent.stdin.close()
        parent.stdout.close()


def test_forked_child_does_not_release_the_lock(tmp_path):
    child = start("""
import os, sys
from mlx_pretrain.run import Run
run = Run("x", "theirs", root=sys.argv[1])
if os.fork() == 0: run.close(); os._exit(0)
os.wait()
print("ready", flush=True)
sys.stdin.read()
""", tmp_path)
    with pytest.raises(RunError, match=f"process {child.pid} is writing"): Run("x", "me", root=tmp_path)
    kill(child)


def test_newer_run_in_one_process_takes_over_the_lock(tmp_path):
    older = Run("x", "older", root=tmp_path)
    older.log({"step": 1})
    newer = Run("x", "newer", root=tmp_path)
    for write in (lambda: older.log({"step": 2}), lambda: older.log_event("knob", 2),
                  lambda: older.log_text("x"), lambda: older.update_metadata(a=1),
                  lambda: older.save_checkpoint(2, ARRAYS, {}), lambda: older.finish("failed")):
        with pytest.raises(RunError, match="A newer run has taken"): write()
    older.close()
    assert (tmp_path / ".x.lock").read_text() == str(os.getpid())
    newer.save_checkpoint(1, ARRAYS, {})
    with pytest.raises(RunError, match="exists already"): Run("x", "newest", root=tmp_path)
    newer.log({"step": 3})                                       # a start that is refused takes nothing away
    assert (
        read_metrics(tmp_path / "x") == [{"step": 3}]
        and (tmp_path / "x" / "config.yaml").read_text() == "newer"
    )
    newer.finish("finished")
    assert os.listdir(tmp_path) == ["x"]


def test_lock_file_deleted_before_locking_is_retried(tmp_path, monkeypatch):
    flock, seen = fcntl.flock, []
    def delete_first(handle, how):
        if not seen: (tmp_path / ".x.lock").unlink()
        seen.append(how)
        flock(handle, how)
    monkeypatch.setattr(fcntl, "flock", delete_first)
    lock = R._Lock(tmp_path / "x")
    assert len(seen) == 2 and os.path.samestat(os.fstat(lock.handle), os.stat(tmp_path / ".x.lock"))
    lock.release()


def test_release_keeps_another_process_lock_file(tmp_path):
    lock = R._Lock(tmp_path / "x")
    (tmp_path / ".x.lock").unlink()                              # by a cleanup script
    child = start(WRITER_OF_X, tmp_path)
    lock.release()
    with pytest.raises(RunError, match=f"process {child.pid}"): R._Lock(tmp_path / "x")
    kill(child)


def test_checking_for_a_writer_does_not_prevent_locking(tmp_path):
    "Checking takes a shared lock for a moment."
    (tmp_path / ".x.lock").touch()
    child = start("""
import fcntl, os, sys, time
handle = os.open(sys.argv[1], os.O_RDONLY)
fcntl.flock(handle, fcntl.LOCK_SH)
print("ready", flush=True)
time.sleep(0.03)
""", tmp_path / ".x.lock")
    R._Lock(tmp_path / "x").release()
    kill(child)


def test_a_disk_without_locks_is_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(*_): raise OSError(errno.ENOTSUP, "Operation not supported")
    monkeypatch.setattr(fcntl, "flock", refuse)
    old_run(tmp_path)
    assert [r.getMessage().partition(" (")[0]
            for r in caplog.records] == [f"{tmp_path / '.x.lock'} cannot be locked"]
    assert os.listdir(tmp_path) == ["x"]


def test_unsupported_full_sync_falls_back_to_fsync(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False) # a Mac's; Linux refuses it
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(handle), fsync(handle)))
    R._replace_file(tmp_path / "a", "text")
    assert sys.platform == "darwin" or len(synced) == 2


# ---- runs without artifacts

@pytest.mark.parametrize("outcome", ["failed", "interrupted", "finished", None])
def test_run_without_artifacts_does_not_block_its_name(outcome, tmp_path):
    run = Run("x", "old", root=tmp_path)
    run.log({"step": 1})
    run.close() if outcome is None else run.finish(outcome)
    (tmp_path / "x" / "checkpoints").mkdir()
    (tmp_path / "x" / "checkpoints" / ".step_000500.new-12").mkdir()     # killed in its first checkpoint
    check_place(tmp_path / "x", False)
    Run("x", "new", root=tmp_path).finish("failed")
    assert (tmp_path / "x" / "config.yaml").read_text() == "new" and os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("worth",
                         ["checkpoints/step_000001", "checkpoints/.step_000001.old-7",
                          "checkpoints/step_000001.damaged", "model",
                                   "adapters", ".model.old-7"])
def test_run_with_artifacts_blocks_its_name(worth, tmp_path):
    Run("x", "old", root=tmp_path).finish("failed")
    (tmp_path / "x" / worth).mkdir(parents=True)
    with pytest.raises(RunError, match="exists already"): Run("x", "new", root=tmp_path)
    assert (tmp_path / "x" / "config.yaml").read_text() == "old"


# ---- damaged checkpoints: the newest valid one

def truncate(path): os.truncate(path / "model.safetensors", 100)
def empty(path): os.truncate(path / "model.safetensors", 0)
def lose_state(path): (path / "state.json").unlink()
def lose_arrays(path): (path / "optimizer.safetensors").unlink()
def lose_manifest(path): (path / "manifest.json").unlink()
def cut_manifest(path): os.truncate(path / "manifest.json", (path / "manifest.json").stat().st_size // 2)
def empty_folder(path): shutil.rmtree(path); path.mkdir()
def file_instead(path): shutil.rmtree(path); path.touch()
def directory_instead(path): lose_state(path); (path / "state.json").mkdir()


def flip_bit(path):
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-7] ^= 4
    (path / "model.safetensors").write_bytes(data)


def shorten_manifest(path):
    "A valid manifest, but without the model."
    hashes = json.loads((path / "manifest.json").read_text())
    del hashes["model.safetensors"]
    (path / "manifest.json").write_text(C._manifest(hashes))


DAMAGES = [truncate, empty, flip_bit, lose_state, lose_arrays, lose_manifest, cut_manifest, shorten_manifest,
           empty_folder, file_instead, directory_instead]


def saved_run(root: Path, steps=(100, 200, 300)) -> Path:
    "A run with a checkpoint every hundred steps, whose weights equal the step."
    run = Run("x", "seed: 0\n", root=root, logging=LoggingConfig(keep_last=len(steps)))
    for step in steps:
        run.log({"step": step, "loss": 1 / step})
        run.save_checkpoint(step, {"model": {"w": mx.full((64,), step)}, "optimizer": {"m": mx.zeros(64)}},
                            {"seed": 0})
    run.close()
    return run.path


@pytest.mark.parametrize("damage", DAMAGES)
def test_newest_valid_checkpoint_is_used_and_damage_reported(damage, tmp_path, caplog):
    path = saved_run(tmp_path)
    damage(path / "checkpoints" / "step_000300")
    saved = latest_checkpoint(path)
    assert saved.path.name == "step_000200" and saved.state == {"seed": 0, "step": 200}
    assert mx.array_equal(saved.arrays["model"]["w"], mx.full((64,), 200))
    [record] = caplog.records
    assert record.levelname == "WARNING" and record.name == "mlx_pretrain"
    assert re.fullmatch(r"\S*/step_000300/\S+ (is|could not) .*; trying the checkpoint before it",
                        record.getMessage())
    caplog.clear()
    damage(path / "checkpoints" / "step_000200")
    assert latest_checkpoint(path).state["step"] == 100 and len(caplog.records) == 2
    damage(path / "checkpoints" / "step_000100")
    for ask in (
        lambda: latest_checkpoint(path),
        lambda: find_checkpoint(ResumeConfig(checkpoint="latest"), path),
    ):
        with pytest.raises(RunError, match="All checkpoints in .* are damaged"): ask()
    with pytest.raises(RunError, match="use an earlier|no checkpoint"):
        load_checkpoint(path / "checkpoints" / "step_000300")


def test_valid_checkpoints_are_not_reported(tmp_path, caplog):
    path = saved_run(tmp_path)
    (path / "checkpoints" / "step_000300" / "._model.safetensors").write_text(
        "what macOS leaves on foreign disks"
    )
    assert latest_checkpoint(path).state["step"] == 300 and caplog.records == []
    assert latest_checkpoint(tmp_path / "nowhere") is None


# ---- `resume.checkpoint`

def hugging_face(path):
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").touch()


@pytest.mark.parametrize("text, make, problem", [
    ("nowhere", None, "nowhere does not exist"), ("runs/nowhere", None, "does not exist"),
    ("Latest", None, "Latest does not exist"),
    ("hub/model", None, "does not exist"), ("notes.txt", lambda p: p.touch(), "is a file"),
    ("hf", hugging_face, "holds a model, but no training state"),
    ("empty", lambda p: p.mkdir(), "neither a checkpoint nor a run"),
    ("r/x/checkpoints", lambda p: saved_run(p.parent.parent), "is a folder of checkpoints; choose one"),
    ("r/x/checkpoints/step_000300/manifest.json", lambda p: saved_run(p.parents[3]), "is a file"),
    ("r/fresh", lambda p: Run("fresh", "", root=p.parent).close(), "has saved no checkpoint"),
])
def test_path_that_cannot_be_resumed_is_an_error_with_a_remedy(text, make, problem, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if make: make(tmp_path / text)
    with pytest.raises(RunError, match=problem) as caught:
        find_checkpoint(ResumeConfig(checkpoint=text), "runs/me")
    assert re.search(r"give a folder like runs/NAME/checkpoints/step_000500, a run directory, or `latest`\.$",
                     str(caught.value))


@pytest.mark.parametrize("damage", [d for d in DAMAGES if d is not file_instead])
def test_explicit_damaged_checkpoint_is_refused(damage, tmp_path):
    path = saved_run(tmp_path) / "checkpoints" / "step_000300"
    damage(path)
    with pytest.raises(RunError, match="step_000300.*use an earlier checkpoint"):
        find_checkpoint(ResumeConfig(checkpoint=str(path)), tmp_path / "me")


def test_paths_that_can_be_resumed(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "mlx_pretrain")
    path = saved_run(tmp_path / "runs")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_checkpoint(ResumeConfig(), path) is None and caplog.records == []
    for text, step in (
        ("latest", 300),
        (str(path), 300),
        (f"{path}/", 300),
        ("~/runs/x", 300),
        (f"{path}/checkpoints/step_000100", 100),
    ):
        assert find_checkpoint(ResumeConfig(checkpoint=text), path).state["step"] == step
    (path / "checkpoints" / "step_000200").rename(tmp_path / "backup")
    assert find_checkpoint(ResumeConfig(checkpoint=str(tmp_path / "backup")), path).state["step"] == 200
    assert caplog.records == []
    for name in ("tomorrow", "fresh"):
        if name == "fresh": Run("fresh", "", root=tmp_path / "runs").finish("failed")
        assert find_checkpoint(ResumeConfig(checkpoint="latest"), tmp_path / "runs" / name) is None
        assert (
            "starting from the beginning" in caplog.records[-1].getMessage()
            and caplog.records[-1].levelname == "INFO"
        )
    assert len(caplog.records) == 2


# ---- resume

def killed_run(root: Path) -> Run:
    "A run with checkpoints at 100 and 200 that was killed at step 250."
    run = Run("x", "iters: 400\nname: x\n", root=root)
    for step in range(10, 260, 10):
        run.log({"step": step, "loss": 1 / step})
        if step in (20, 200, 230): run.log_event("knob", step - 1, name="lr", value=step)
        if step == 200: run.log_event("knob", 200, name="lr", value=7.0)
        if step % 100 == 0: run.save_checkpoint(step, {"model": {"w": mx.full((8,), step)}}, {"seed": 0})
    run.update_metadata(parameters=8, ended="never", total_steps=400)
    run.close()
    with open(run.path / "metrics.jsonl", "a") as f: f.write('{"step": 260, "lo')
    return run


def test_resume_in_place_restores_the_state_at_the_checkpoint(tmp_path, caplog):
    path = killed_run(tmp_path).path
    born = json.loads((tmp_path / "x" / "metadata.json").read_text())["created"]
    before = read_metrics(path)
    run = Run.resume(latest_checkpoint(path), "x", "iters: 500\nname: y\n", root=tmp_path)
    expected = [row for row in before if row["step"] <= 200
                and row != {"event": "knob", "step": 200, "name": "lr", "value": 7.0}]
    assert len(expected) == 22  # 20 lines of metrics; the events with 19 and 199
    assert read_metrics(path) == [*expected, {"event": "resume", "step": 200}]
    assert (path / "config.yaml").read_text() == "iters: 500\nname: y\n"
    known = json.loads((path / "metadata.json").read_text())
    assert (
        known["outcome"] == "running"
        and known["created"] == born
        and known["parameters"] == 8
        and "ended" not in known
    )
    assert [r.getMessage()
            for r in caplog.records] == ["resuming with another configuration: iters: 400 → 500"]
    assert "step_000200" in (log := (path / "logs" / "log.txt").read_text()) and "iters: 400 → 500" in log
    assert list_runs(tmp_path)[0]["outcome"] == "running" and "resumed_from" not in known
    run.log({"step": 210})
    run.save_checkpoint(300, {"model": {}}, {})
    run.finish("finished")
    assert [p.name for p in checkpoints(path)] == ["step_000100", "step_000200",
                                                   "step_000300"] and os.listdir(tmp_path) == ["x"]


def test_unchanged_configuration_is_not_reported_and_outcome_is_reset(tmp_path, caplog):
    path = killed_run(tmp_path).path
    run = Run.resume(latest_checkpoint(path), "x", "iters: 400\nname: x\n", root=tmp_path)
    run.finish("interrupted")
    Run.resume(latest_checkpoint(path), "x", "iters: 400\nname: y\n", root=tmp_path).close()
    known = json.loads((path / "metadata.json").read_text())
    assert known["outcome"] == "running" and "ended" not in known and caplog.records == []


def test_resume_through_an_equivalent_path(tmp_path, monkeypatch):
    killed_run(tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "runs")
    for root in ("runs", "./runs/../runs", "link", tmp_path / "runs"):
        saved = find_checkpoint(ResumeConfig(checkpoint="latest"), Path(root) / "x")
        Run.resume(saved, "x", "iters: 400\n", root="runs").close()
    assert os.listdir("runs") == ["x"] and read_metrics("runs/x")[-1] == {"event": "resume", "step": 200}


def test_resume_never_loses_later_checkpoints(tmp_path):
    path = saved_run(tmp_path)
    def contents(): return {str(p): p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()}
    before = contents()
    saved = find_checkpoint(ResumeConfig(checkpoint=str(path / "checkpoints" / "step_000100")), path)
    flip_bit(path / "checkpoints" / "step_000300")
    with pytest.raises(
        RunError,
        match="later checkpoints than step 100, up to step_000200; "
        "resume from `latest`, or give another `name`",
    ):
        Run.resume(saved, "x", "", root=tmp_path)
    flip_bit(path / "checkpoints" / "step_000300")               # back
    assert contents() == before
    branch = Run.resume(saved, "y", "", root=tmp_path)
    branch.save_checkpoint(110, ARRAYS, {})
    branch.close()
    assert {k: v for k, v in contents().items() if k.startswith(str(path))} == before
    assert json.loads((tmp_path / "y" / "metadata.json").read_text())["resumed_from"] == str(saved.path)
    assert read_metrics(tmp_path / "y") == [{"event": "resume", "step": 100}]
    with pytest.raises(RunError, match="exists already"): Run.resume(saved, "y", "", root=tmp_path)
    waiting = Run.resume(saved, "y", "", root=tmp_path, overwrite=True)
    assert waiting.path != waiting.final and len(checkpoints(tmp_path / "y")) == 1
    waiting.close()


def test_later_damaged_checkpoints_are_renamed_each_time(tmp_path):
    path = saved_run(tmp_path)
    for _ in range(2):
        flip_bit(path / "checkpoints" / "step_000300")
        run = Run.resume(latest_checkpoint(path), "x", "", root=tmp_path)
        run.save_checkpoint(300, ARRAYS, {})
        run.close()
    assert sorted(os.listdir(path / "checkpoints")) == ["step_000100", "step_000200", "step_000300",
                                                        "step_000300.damaged", "step_000300.damaged+"]
    same(latest_checkpoint(path).arrays, ARRAYS)


def test_resume_removes_leftovers_and_restores_a_checkpoint_being_replaced(tmp_path):
    path = saved_run(tmp_path)
    folder = path / "checkpoints"
    shutil.copytree(folder / "step_000100", folder / ".step_000100.old-77")      # its swap was finished
    (folder / "step_000300").rename(folder / ".step_000300.old-77")              # its swap was cut in two
    shutil.copytree(folder / "step_000200", folder / ".step_000300.new-77")
    (folder / "step_000200").rename(folder / ".step_000200.gone-77")             # was being deleted
    for name in (".metrics.jsonl.new-77", ".config.yaml.new-77", ".keep"): (path / name).touch()
    for name in (".x.new-77", ".x.old-77", ".y.new-77"): (tmp_path / name).mkdir()
    saved = latest_checkpoint(path)
    assert saved.path.name == ".step_000300.old-77" and saved.state["step"] == 300
    assert find_checkpoint(ResumeConfig(checkpoint=str(saved.path)), path).state["step"] == 300
    Run.resume(saved, "x", "", root=tmp_path).close()
    assert sorted(os.listdir(folder)) == ["step_000100", "step_000300"]
    assert latest_checkpoint(path).state["step"] == 300
    assert sorted(p.name for p in path.glob(".*")) == [".keep"] and sorted(os.listdir(tmp_path)) == [
        ".y.new-77",
        "x",
    ]


def test_another_checkpoint_folder_is_refused_and_damaged_logs_are_tolerated(tmp_path, caplog):
    path = saved_run(tmp_path)
    saved = latest_checkpoint(path)
    with pytest.raises(
        RunError, match="keeps its checkpoints in 'checkpoints': set `logging.checkpoint_dir` to that"
    ):
        Run.resume(saved, "x", "", root=tmp_path, logging=LoggingConfig(checkpoint_dir="c"))
    (path / "metrics.jsonl").write_bytes(
        b'{"step": 100}\n\0\0\0\n[1]\n{"step": null}\n{"step": 300}\n\xff\n{"step": 400}\n'
    )
    (path / "metadata.json").write_text('{"versions')
    (path / "config.yaml").write_text("a: b: c")
    shutil.rmtree(path / "logs")
    Run.resume(saved, "x", "seed: 0\n", root=tmp_path, logging=LoggingConfig(log_dir="l")).finish("finished")
    assert read_metrics(path) == [{"step": 100}, {"step": None}, {"step": 300},
                                  {"event": "resume", "step": 300}]
    assert [r.getMessage() for r in caplog.records] == [
        f"{path / 'metrics.jsonl'}: skipped 3 damaged lines, the first is line 2"
    ]
    assert (
        is_run(path) and list_runs(tmp_path)[0]["outcome"] == "finished" and (path / "l" / "log.txt").exists()
    )


@given(st.lists(st.tuples(st.integers(0, 30), st.booleans()), max_size=20), st.integers(0, 30))
@settings(deadline=None, max_examples=60)
def test_truncating_metrics_is_idempotent(tmp_path_factory, rows, step):
    file = tmp_path_factory.mktemp("cut") / "metrics.jsonl"
    rows = [{"event": "e", "step": s} if event else {"step": s, "loss": s / 3} for s, event in rows]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for _ in range(2):
        R._truncate_metrics(file, step)
        assert [json.loads(line) for line in file.read_text().splitlines()] == [
            row for row in rows if row["step"] < step or (row["step"] == step and "event" not in row)]


@pytest.mark.parametrize("name", ["", "../x", "a/b"])
def test_resumed_run_needs_a_valid_name(name, tmp_path):
    saved = latest_checkpoint(saved_run(tmp_path))
    with pytest.raises(RunError, match="choose another `name`"):
        Run.resume(saved, name, "", root=tmp_path / "runs")
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("old, new, expected", [
    ({}, {}, []),
    ({"a": {"b": {"c": 1}}}, {"a": {"b": {"c": 2}}}, ["a.b.c: 1 → 2"]),
    ({"a": 1}, {"a": 1.0}, ["a: 1 → 1.0"]),
    ({"a": [0.9, 0.95]}, {"a": [0.9, 0.99]}, ["a: [0.9, 0.95] → [0.9, 0.99]"]),
    ({"a": None}, {"a": "é"}, ['a: null → "é"']),
    ({"a": {"b": 1}}, {"a": {"c": 1}}, ["a.b: 1 → not there", "a.c: not there → 1"]),
    ({"system": {"seed": 1, "device": "cpu"}}, {"system": {"seed": 2, "device": "gpu"}},
     ["system.seed: 1 → 2"]),
    ({"name": "a", "overwrite": True, "resume": {"checkpoint": None},
      "logging": {"steps": {"logging_interval": 1}}},
     {"name": "b", "overwrite": False, "resume": {"checkpoint": "latest"},
      "logging": {"steps": {"logging_interval": 2}}}, []),
    ({"names": 1, "model": {"name": 1}}, {"names": 2, "model": {"name": 2}},
     ["names: 1 → 2", "model.name: 1 → 2"]),
])
def test_changed_keys(old, new, expected): assert changed_keys(old, new) == expected


# ---- which checkpoints stay

@pytest.mark.parametrize("keep_last", [1, 2, 3, 20])
@pytest.mark.parametrize("best", [None, 0, 30, 100])
def test_newest_and_best_checkpoints_are_kept(keep_last, best, tmp_path):
    run = Run("x", "", root=tmp_path, logging=LoggingConfig(keep_last=keep_last, checkpoint_dir="c"))
    for step in range(10, 110, 10):
        assert run.save_checkpoint(step, {}, {}, best=best if best and best <= step else None).is_dir()
    stay = {*range(10, 110, 10)[-keep_last:]} | ({best} if best == 100
                                                 or (best == 30 and keep_last > 2) else set())
    if best == 30: stay |= {30}
    assert [int(p.name[5:]) for p in checkpoints(run.path)] == sorted(stay)
    assert sorted(os.listdir(run.path / "c")) == sorted(p.name for p in checkpoints(run.path))


def test_a_checkpoint_that_cannot_be_deleted_is_a_warning(tmp_path, monkeypatch, caplog):
    path = saved_run(tmp_path, (100, 200))
    run = Run.resume(latest_checkpoint(path), "x", "seed: 0\n", root=tmp_path,
                     logging=LoggingConfig(keep_last=1))
    monkeypatch.setattr(shutil, "rmtree", lambda path, ignore_errors=False: ignore_errors or os.rmdir(path))
    run.save_checkpoint(300, {}, {})
    assert latest_checkpoint(path).state["step"] == 300
    assert [bool(re.search(r"step_000[12]00 could not be deleted", r.getMessage()))
            for r in caplog.records] == [True, True]


# ---- the list

def test_list_runs(tmp_path):
    run = Run("a", "", root=tmp_path)
    run.update_metadata(parameters=2_100_000, total_steps=1000, created="2026-01-02T00:00:00+00:00")
    for step, val in ((100, 3.0), (200, 2.0), (300, 2.5)):
        run.log({"step": step, "loss": 4.0 / step, "val_loss": val, "val_bits_per_byte": val / 2})
    run.log({"step": 310, "loss": math.nan})
    run.log_event("knob", 320, name="loss", val_loss=1.0)
    run.save_checkpoint(300, {"model": {"w": mx.zeros(1000)}}, {})
    b = Run("模型", "", root=tmp_path)
    b.update_metadata(created="2026-01-01T00:00:00+00:00")
    b.finish("failed")
    found = list_runs(tmp_path)
    assert [r["name"] for r in found] == ["模型", "a"]
    a = found[1]
    assert {k: v for k, v in a.items() if k != "size"} == {"name": "a", "path": tmp_path / "a",
                                                           "outcome": "running", "step": 320,
                                                           "total_steps": 1000, "loss": None, "val_loss": 2.5,
                                                           "best_val_loss": 2.0, "val_bits_per_byte": 1.25,
                                                           "reward": None, "parameters": 2_100_000,
                                                           "created": "2026-01-02T00:00:00+00:00"}
    assert a["size"] == sum(p.stat().st_size for p in (tmp_path / "a").rglob("*") if p.is_file()) > 4000
    run.close()
    assert [r["outcome"] for r in list_runs(tmp_path)] == ["failed", "killed"]
    lines = runs_table(found).split("\n")
    assert len(lines) == 3 and re.search(r"2\.1M +\d\.\d+kB",
                                         lines[2]) and "320/1k" in lines[2] and lines[2].count("–") == 1
    # two wide characters
    assert lines[1].index("failed") + 2 == lines[2].index("running") == lines[0].index("outcome")


def test_run_written_by_another_process_is_running(tmp_path):
    child = start(WRITER_OF_X, tmp_path)
    assert [r["outcome"] for r in list_runs(tmp_path)] == ["running"]
    kill(child)
    assert [r["outcome"] for r in list_runs(tmp_path)] == ["killed"]


@pytest.mark.parametrize("damage", [
    lambda p: (p / "metrics.jsonl").write_bytes(b"\0\0\n[]\n{\n\xff\n" + b"[" * 10**5 + b"\n"),
    lambda p: (p / "metrics.jsonl").mkdir(),
    lambda p: (p / "metrics.jsonl").write_text(
        '{"step": "x", "loss": [1], "val_loss": "low", "val_bits_per_byte": {}}\n'),
    lambda p: (p / "metadata.json").write_text(
        '{"versions": {"mlx_pretrain": 1}, "outcome": 7, "created": 7, "parameters": "many"}'),
    lambda p: (p / "metadata.json").write_text(
        '{"versions": {"mlx_pretrain": 1}, "total_steps": {}, "checkpoint_dir": 3}'),
    lambda p: (p / "metadata.json").write_text(
        '{"versions": {"mlx_pretrain": 1}, "outcome": "running", "checkpoint_dir": "/etc"}'),
    lambda p: (p / "dangling").symlink_to("nowhere"),
    lambda p: shutil.rmtree(p / "logs"),
])
def test_damaged_run_does_not_hide_the_others(damage, tmp_path):
    for name in ("a", "b"): Run(name, "", root=tmp_path).finish("finished")
    damage(tmp_path / "a")
    found = list_runs(tmp_path)
    assert sorted(r["name"] for r in found) == ["a", "b"] and runs_table(found).count("\n") == 2
    assert checkpoints(tmp_path / "a") == []


def test_other_directories_are_not_listed(tmp_path):
    assert list_runs(tmp_path / "nowhere") == [] and runs_table([]).count("\n") == 0
    (tmp_path / "file").touch()
    (tmp_path / "photos").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "metadata.json").write_text('{"versions"')
    old_run(tmp_path)
    Run("x", "", root=tmp_path, overwrite=True).finish("interrupted")    # still waits in its hidden folder
    assert [r["name"] for r in list_runs(tmp_path)] == ["x"]


# ---- power loss at every change of the disk

class PowerCut(BaseException): "Nothing after it reaches the disk."


@contextmanager
def power_cut(after: int):
    "Allow `after` changes of the disk and no more; the file being written then keeps half of its bytes."
    count = 0
    def cut(change, half=None):
        def changed(*args, **kwargs):
            nonlocal count
            count += 1
            if count > after:
                if half and count == after + 1: half(change, *args, **kwargs)
                raise PowerCut
            return change(*args, **kwargs)
        return changed
    def half_text(write, path, text, **kwargs): write(path, text[:len(text) // 2], **kwargs)
    def half_arrays(save, path, arrays, **kwargs):
        save(path, arrays, **kwargs)
        os.truncate(path, os.stat(path).st_size // 2)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("rename", "replace", "unlink", "rmdir", "mkdir"):
            patch.setattr(os, name, cut(getattr(os, name)))
        patch.setattr(Path, "write_text", cut(Path.write_text, half_text))
        patch.setattr(Path, "write_bytes", cut(Path.write_bytes, half_text))
        patch.setattr(mx, "save_safetensors", cut(mx.save_safetensors, half_arrays))
        patch.setattr(R, "_append", cut(R._append))
        for module in (R, C, core): patch.setattr(module, "fsync", lambda path: None)
        try: yield
        except PowerCut: pass


def weights_of(step: int, again: int = 0):
    return {"model": {"w": mx.full((64,), step)}, "optimizer": {"m": mx.full((64,), again)}}


def save_next(root):
    Run.resume(latest_checkpoint(root / "x"), "x", "", root=root,
               logging=LoggingConfig(keep_last=2)).save_checkpoint(400, weights_of(400), {}, best=200)


def save_again(root):
    run = Run.resume(latest_checkpoint(root / "x"), "x", "", root=root)
    run.save_checkpoint(300, weights_of(300, again=1), {})


def only_resume(root):
    (root / "x" / "metrics.jsonl").write_text('{"step": 300}\n{"step": 310}\n')
    Run.resume(latest_checkpoint(root / "x"), "x", "", root=root)


def overwrite(root): Run("x", "new", root=root, overwrite=True).save_checkpoint(500, weights_of(500), {})


def dead(root: Path):
    "Simulate the end of the process: the kernel releases its locks."
    for lock in list(R._HELD.values()): os.close(lock.handle)
    R._HELD.clear()


def survive(act, root: Path) -> int:
    "Cut the power after each change by `act`: the run must be valid and resume. Returns their number."
    for after in range(1000):
        shutil.rmtree(root, ignore_errors=True)
        path = saved_run(root)
        done = False
        with power_cut(after):
            act(root)
            done = True
        dead(root)
        saved = find_checkpoint(ResumeConfig(checkpoint="latest"), path)
        # in the middle of a swap of runs: the next start puts the old one back
        if saved is None:
            with pytest.raises(RunError, match="exists already"): Run("x", "", root=root)
            saved = latest_checkpoint(path)
        step = saved.state["step"]
        assert step >= 300 and mx.array_equal(saved.arrays["model"]["w"], mx.full((64,), step))
        assert bad_checkpoints(root / "x") == []
        with power_cut(after % 9): Run.resume(saved, "x", "", root=root)     # and once more, while it resumes
        dead(root)
        run = Run.resume(latest_checkpoint(path), "x", "", root=root)
        run.save_checkpoint(step + 1, weights_of(step + 1), {})
        run.finish("finished")
        assert latest_checkpoint(path).state["step"] == step + 1 and os.listdir(root) == ["x"]
        assert not list(path.rglob(".*")) and all(re.fullmatch(r"step_\d{6}", p.name)
                                                  for p in (path / "checkpoints").iterdir())
        read_metrics(path)
        if done: return after
    raise AssertionError("never done")


@pytest.mark.long
@pytest.mark.parametrize("act, least", [(save_next, 20), (save_again, 15), (only_resume, 8), (overwrite, 15)])
def test_power_loss_at_any_moment(act, least, tmp_path, caplog):
    assert survive(act, tmp_path / "runs") >= least
    assert not [r for r in caplog.records if "trying the checkpoint before" in r.getMessage()]


def in_place(folder, step, arrays, state):
    "Planted bug: the files are written to their final path."
    final = Path(folder) / f"step_{step:06d}"
    final.mkdir(parents=True, exist_ok=True)
    for group, tensors in arrays.items(): mx.save_safetensors(str(final / f"{group}.safetensors"), tensors)
    (final / "state.json").write_text(json.dumps({**state, "step": step}))
    (final / "manifest.json").write_text(C._manifest({p.name: C._sha256(p)
                                                      for p in final.iterdir() if p.name != "manifest.json"}))
    return final


def prune_in_place(folder, keep_last, best):
    "Planted bug: a checkpoint is deleted without being renamed first."
    for path in C.list_checkpoints(folder)[:-keep_last]: shutil.rmtree(path)


def prune_first(write):
    "Planted bug: the old checkpoints are deleted before the new one is written."
    def pruning(folder, *args):
        for path in sorted(Path(folder).glob("step_*")): shutil.rmtree(path)
        return write(folder, *args)
    return pruning


def replace_without_renaming(new, final, replace=True):
    shutil.rmtree(final, ignore_errors=True)
    os.rename(new, final)


@pytest.mark.parametrize("name, bug, act, why", [
    ("write_checkpoint", in_place, save_next, "step_000400/.* is (missing|damaged)"),
    ("prune_checkpoints", prune_in_place, save_next, "step_000100/.* is missing"),
    ("write_checkpoint", prune_first(write_checkpoint), save_next, "are damaged"),
    ("replace_dir", replace_without_renaming, save_again, "200 >= 300"),
    ("replace_dir", replace_without_renaming, overwrite, "step_000.00/.* is missing"),
    ("remove_leftovers", lambda folder, names: None, save_again, r"\.step_000300\.new-"),
], ids=["written in place", "deleted in place", "deleted before the new one exists",
        "same step deleted first", "old run deleted first", "leftovers not removed"])
def test_planted_power_loss_bugs_are_detected(name, bug, act, why, tmp_path, monkeypatch):
    for module in (R, C):
        if hasattr(module, name): monkeypatch.setattr(module, name, bug)
    with pytest.raises((AssertionError, RunError, OSError)) as caught: survive(act, tmp_path / "runs")
    dead(tmp_path)
    assert re.search(why, str(caught.value)), caught.value


# ---- killed while it trains, again and again

TRAINING = """
import json, sys
from pathlib import Path
import mlx.core as mx
from mlx_pretrain import checkpoint as C, run as R
how, root = sys.argv[1], Path(sys.argv[2])
if how == "in place": R.write_checkpoint = in_place
print("ready", flush=True)
logging = R.LoggingConfig(keep_last=2)
saved = R.find_checkpoint(R.ResumeConfig(checkpoint="latest"), root / "x")
run = R.Run.resume(saved, "x", "", root, logging=logging) if saved else R.Run("x", "", root, logging=logging)
step = saved.state["step"] if saved else 0
while True:
    step += 1
    run.log({"step": step})
    for again in (0, 1):                                         # the second save replaces the first
        arrays = {"model": {"w": mx.full((50_000,), step)}, "optimizer": {"m": mx.full((50_000,), again)}}
        run.save_checkpoint(step, arrays, {"again": again}, best=step // 10 * 10 or None)
        print(step, flush=True)
"""


def kill_a_training(how: str, root: Path, rng: random.Random) -> int:
    "Start a training in `root`, kill it after a moment; returns the last step that it reported as saved."
    child = start(inspect.getsource(in_place) + TRAINING, how, root)
    if first := rng.random() < 0.6: first = child.stdout.readline()
    time.sleep(rng.uniform(0, 0.08))
    assert child.poll() is None
    lines = (first or "") + kill(child)
    return max(map(int, lines.split("\n")[:-1]), default=0)


def check_training(root: Path, reported: int) -> int:
    "No reported step is lost, no checkpoint is damaged; returns the newest step."
    saved = latest_checkpoint(root / "x")
    step = saved.state["step"] if saved else 0
    assert step >= reported, f"step {reported} was saved, and now the last is {step}"
    if saved: assert mx.array_equal(saved.arrays["model"]["w"], mx.full((50_000,), step))
    assert bad_checkpoints(root / "x") == []
    steps = [int(p.name.split("_")[1][:6]) for p in checkpoints(root / "x")]
    assert step < 12 or (step // 10 * 10 in steps or (step - 1) // 10 * 10 in steps)
    assert len(steps) <= 5
    return step


@pytest.mark.long
def test_thirty_kills_lose_no_saved_step(tmp_path, caplog):
    rng, step = random.Random(0), 0
    for _ in range(30): step = check_training(tmp_path, max(step, kill_a_training("atomic", tmp_path, rng)))
    assert step > 30
    saved = latest_checkpoint(tmp_path / "x")
    Run.resume(saved, "x", "", root=tmp_path).finish("finished")
    assert [row["step"] for row in read_metrics(tmp_path / "x")
            if "event" not in row] == list(range(1, step + 1))
    assert os.listdir(tmp_path) == ["x"] and not list((tmp_path / "x").rglob(".*"))
    assert caplog.records == []


@pytest.mark.long
def test_planted_in_place_saving_is_detected_by_kills(tmp_path):
    rng, step = random.Random(0), 0
    with pytest.raises((AssertionError, RunError)):
        for _ in range(30):
            step = check_training(tmp_path, max(step, kill_a_training("in place", tmp_path, rng)))


def test_a_run_without_checkpoints_cannot_be_resumed(tmp_path):
    "The message about a taken name offers to resume only where there is a checkpoint."
    run = Run("a", "", root=tmp_path)
    run.save_checkpoint(1, {}, {})
    run.finish("finished")
    with pytest.raises(RunError, match="set `resume.checkpoint: latest` to resume"):
        Run("a", "", root=tmp_path)
    (run.path / "model").mkdir()
    shutil.rmtree(run.path / "checkpoints")
    with pytest.raises(RunError, match="choose another `name`, or `overwrite: true`"):
        Run("a", "", root=tmp_path)
