"Encodings, unwritable streams, and signals at any moment: exit codes and one line, never a traceback."
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import mlx_pretrain  # noqa: F401 (before MLX)
from mlx_pretrain.cli import main
from mlx_pretrain.console import safe

YAML = """
name: Où
overwrite: true
data: {input_file: text.jsonl, preprocessing: {max_context_size: 16}}
model: {dimensions: {hidden_size: 16, num_layers: 1}}
training: {hyperparameters: {batch_size: 4, iters: 3}}
"""
TRAIN = ["train", "--config", "run.yaml"]
AS_COMMAND = ("import sys; from mlx_pretrain.__main__ import main; print('ready', flush=True); "
              "sys.exit(main(sys.argv[1:]))")
NOT_SAID = ("Traceback", "Logging error", "ignored")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.jsonl").write_text("".join(json.dumps({"text": f"Line {i} of a short text: é, ☕."}) + "\n"
                                          for i in range(20)))
    Path("run.yaml").write_text(YAML, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_terminal_without_unicode(encoding, here, monkeypatch):
    "Characters that cannot be encoded are replaced."
    said = {}
    for words in (
        ["--help"],
        ["sft", "--help"],
        TRAIN,
        ["runs"],
        ["generate", "--run", "Où", "--prompt", "☕", "--max_new_tokens", "3"],
    ):
        streams = [io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2)]
        monkeypatch.setattr(sys, "stdout", streams[0])
        monkeypatch.setattr(sys, "stderr", streams[1])
        assert main(words) == 0
        said[words[0]] = streams[0].buffer.getvalue().decode(encoding)
        assert (sys.stdout, sys.stderr) == tuple(streams)
    assert "COMMAND ?" in said["--help"] and said["generate"].startswith("?")
    assert "O? " in said["runs"] or encoding == "latin-1" and "Où" in said["runs"]


@pytest.mark.linux
@pytest.mark.parametrize("shell", [">/dev/full", ">/dev/full 2>/dev/full", ">&- 2>&- <&-"])
def test_unwritable_streams_do_not_stop_training(shell, here):
    "Training finishes, and the log records that output was lost."
    env = {**os.environ, "PYTHONUNBUFFERED": "1" if "2>/dev" in shell else ""}
    done = subprocess.run(["sh", "-c", f'exec "$@" {shell}', "sh", sys.executable, "-m", "mlx_pretrain",
                           *TRAIN], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and not any(word in done.stderr for word in NOT_SAID), done.stderr
    assert json.loads(Path("runs/Où/metadata.json").read_text())["outcome"] == "finished"
    noted = "standard output could not be written" in Path("runs/Où/logs/log.txt").read_text()
    assert noted == (">/dev/full" in shell)


@pytest.mark.linux
@pytest.mark.parametrize("words", [["--help"], ["train", "--help"]])
def test_unwritable_result_is_an_error(words):
    "One line if it cannot be written."
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "mlx_pretrain", *words], stdout=full,
                              stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "could not be written" in done.stderr


def test_closed_pipe_is_not_an_error(here):
    done = subprocess.run(f"{sys.executable} -m mlx_pretrain --help | true; echo ${{PIPESTATUS[0]}}",
                          shell=True, executable="/bin/bash", capture_output=True, text=True)
    assert done.stdout in ("141\n", "0\n") and done.stderr == ""


def test_stream_stores_its_first_error():
    class Full(io.StringIO):
        def write(self, text): raise OSError(28, "full")
    stream = safe(Full())
    for _ in range(3): print("x", file=stream, flush=True)
    assert stream.error.errno == 28 and safe(stream) is stream
    print("x", file=safe(None), flush=True)


SIGNALS = [["SIGINT"], ["SIGTERM"], ["SIGINT"] * 4, ["SIGTERM", "SIGTERM", "SIGTERM"]]


@pytest.mark.long
def test_interrupt_at_any_moment(here):
    "During import, reading, timing steps, training or exit: one line, and the conventional exit code."
    for names in SIGNALS:
        children = []
        for n in range(3):
            words = [*TRAIN, "--name", f"{names[0]} {len(names)} {n}", "--training.hyperparameters.iters",
                     "100000"]
            child = subprocess.Popen([sys.executable, "-c", AS_COMMAND, *words], stdout=subprocess.PIPE,
                                     stderr=subprocess.PIPE, text=True)
            assert child.stdout.readline() == "ready\n"
            children.append((time.monotonic() + random.uniform(0.005, 2), child))
        for moment, child in sorted(children, key=lambda pair: pair[0]):
            time.sleep(max(0, moment - time.monotonic()))
            for name in names:
                child.send_signal(getattr(signal, name))
                time.sleep(0.01)
        for _, child in children:
            _, said = child.communicate(timeout=60)
            assert child.returncode == 128 + getattr(signal, names[0]), (names, child.returncode, said)
            assert said.count("Stopped.") == 1 and not any(word in said for word in NOT_SAID), (names, said)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_interrupt_while_training(name, here):
    "It saves, and prints how to resume; the exit code is that of the signal."
    words = [*TRAIN, "--name", name, "--training.hyperparameters.iters", "100000"]
    child = subprocess.Popen([sys.executable, "-m", "mlx_pretrain", *words], stdout=subprocess.DEVNULL,
                             stderr=subprocess.PIPE, text=True)
    while not Path("runs", name, "metrics.jsonl").exists(): assert child.poll() is None
    child.send_signal(getattr(signal, name))
    _, said = child.communicate(timeout=60)
    assert child.returncode == 128 + getattr(signal, name), said
    assert "--resume.checkpoint latest" in said and said.endswith("Stopped.\n") and "Traceback" not in said, (
        said
    )


PROCESS = """
from mlx_pretrain.console import exit_if_stopped, handle_signals
handle_signals()
try: command()
except BaseException as error:
    exit_if_stopped(error)
    raise
"""


def test_import_that_suppresses_ctrl_c(tmp_path, monkeypatch):
    "A module that ignores any failure of an optional import."
    (tmp_path / "stubborn.py").write_text("import time\nprint('here', flush=True)\ntry: time.sleep(30)\n"
                                          "except BaseException: pass\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    code = "def command():\n import stubborn\n print('lost')\n" + PROCESS
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             text=True)
    assert child.stdout.readline() == "here\n"
    child.send_signal(signal.SIGINT)
    assert child.communicate(timeout=30) == ("", "Stopped.\n") and child.returncode == 130


def test_exception_raised_from_ctrl_c():
    "An extension module may raise another exception from it."
    code = """
import time
def command():
    print("here", flush=True)
    try: time.sleep(30)
    except BaseException: raise ValueError("odd")
""" + PROCESS
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             text=True)
    assert child.stdout.readline() == "here\n"
    child.send_signal(signal.SIGINT)
    assert child.communicate(timeout=30) == ("", "Stopped.\n") and child.returncode == 130


def test_ctrl_c_in_destructor_is_not_lost():
    code = """
import time
class Slow:
    def __del__(self):
        print("here", flush=True)
        time.sleep(30)
def command():
    Slow()
    print("forgotten", flush=True)
""" + PROCESS
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             text=True)
    assert child.stdout.readline() == "here\n"
    child.send_signal(signal.SIGINT)
    assert child.communicate(timeout=30) == ("", "Stopped.\n") and child.returncode == 130


def test_error_without_signal_is_raised():
    "Fails if any error is reported as a stop."
    code = "def command(): 1 / 0\n" + PROCESS
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr
