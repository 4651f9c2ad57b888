"""User errors, from the command line to the exit code: 2, one line per mistake, and no file has changed.

Each mistake appears once here, at the first command that detects it. Mistakes inside files are tested in
test_config.py and test_data.py.
"""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_pretrain  # noqa: F401 (before MLX)
from mlx_pretrain.cli import main
from mlx_pretrain.run import is_run

ROOT = Path(__file__).resolve().parents[1]
YAML = """\
data: {input_file: text.jsonl, preprocessing: {max_context_size: 16}}
model: {dimensions: {hidden_size: 16, num_layers: 1}}
training: {hyperparameters: {batch_size: 4, iters: 3}}
"""
TEXT = "".join(json.dumps({"text": f"Line {i} of a short text."}) + "\n" for i in range(20))
TRAIN = ["train", "--config", "run.yaml"]


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    "A directory with a configuration, a text and the finished run made from them."
    folder, before = tmp_path_factory.mktemp("finished"), Path.cwd()
    os.chdir(folder)
    try:
        Path("run.yaml").write_text(YAML)
        Path("text.jsonl").write_text(TEXT)
        assert main(TRAIN) == 0
    finally: os.chdir(before)
    return folder


@pytest.fixture
def here(tmp_path, finished, monkeypatch):
    "A copy of it, to be damaged."
    shutil.copytree(finished, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def listing(folder):
    "Every path below a folder, with the bytes of each file."
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
            for p in sorted(folder.rglob("*"))}


def write(name, content):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())


def edit(name, **changes): write(name, json.dumps({**json.loads(Path(name).read_text()), **changes}))


def broken(content, name="text.jsonl"): return lambda: write(name, content)


NEW = [*TRAIN, "--name", "new"]
HYPER, DATA = "--training.hyperparameters.", "--data."
MISTAKES = {  # name: (what to break first, command, the pieces of each line)
    # the configuration
    "no such command": (None, ["fly"], [("unknown command 'fly'", "train")]),
    "no configuration": (None, ["train"], [("a configuration is needed", "--config FILE")]),
    "configuration misspelt": (
        None,
        ["train", "--config", "rum.yaml"],
        [("no configuration rum.yaml", 'did you mean "run.yaml"?')],
    ),
    "configuration is a directory": (
        None,
        ["train", "--config", "runs/run"],
        [("runs/run is a directory", 'did you mean "runs/run/config.yaml"?')],
    ),
    "configuration is a pipe": (
        lambda: os.mkfifo("pipe"),
        ["train", "--config", "pipe"],
        [("pipe is a pipe", "into a file")],
    ),
    "configuration is the data": (
        broken(TEXT * 500),
        ["train", "--config", "text.jsonl"],
        [("text.jsonl is longer than 100,000 bytes", "data file by mistake?")],
    ),
    "not YAML": (
        broken("data:\n\tinput_file: a\n", "run.yaml"),
        TRAIN,
        [("run.yaml, line 2", "a tab is not allowed here; use spaces")],
    ),
    "section misspelt": (
        broken(YAML + "sistem: {seed: 1}\n", "run.yaml"),
        TRAIN,
        [("run.yaml, line 4", '"sistem" is not a key', 'did you mean "system"?')],
    ),
    "key at the wrong level": (
        broken(YAML + "seed: 1\n", "run.yaml"),
        TRAIN,
        [("run.yaml, line 4", 'did you mean "system.seed"?')],
    ),
    "four mistakes, three in the file": (
        broken(YAML + "overwrite: yes\nsystem: {seed: '1'}\nname: a\nname: b\n", "run.yaml"),
        [*TRAIN, "--training.epochs", "0"],
        [
            ("run.yaml, line 4", '"overwrite" should be true or false'),
            ("run.yaml, line 5", "remove the quotes"),
            ("run.yaml, line 7", "keep one of them"),
            ("command line", '"training.epochs" should be greater than or equal to 1'),
        ],
    ),
    "no steps": (
        None,
        [*NEW, HYPER + "iters", "0"],
        [("command line", "iters", "greater than or equal to 1, not 0")],
    ),
    "a rate that is no number": (
        None,
        [*NEW, HYPER + "learning_rate", ".nan"],
        [("command line", "finite number, not NaN")],
    ),
    "a rate that is a word": (
        None,
        [*NEW, HYPER + "learning_rate", "fast"],
        [("command line", 'should be a number, not "fast"')],
    ),
    "a key misspelt, and a value": (
        None,
        [*NEW, HYPER + "lerning_rate", "1", "--system.seed", "1.5"],
        [("command line", 'did you mean "training.hyperparameters.learning_rate"'), ("system.seed", "1.5")],
    ),
    "a key twice": (
        None,
        [*NEW, "--system.seed", "1", "--system.seed=2"],
        [("command line", '"--system.seed" is given twice')],
    ),
    "a word without a key":
        (None, ["train", "run.yaml"], [("command line", 'unexpected argument "run.yaml"')]),
    "two schedules of warm-up": (
        None,
        [*NEW, "--training.scheduler.warmup_steps", "1", "--training.scheduler.warmup_ratio", "0.1"],
        [("command line", "keep one of them")],
    ),
    "a model larger than any machine": (
        None,
        [*NEW, "--model.dimensions.hidden_size", "100_000", "--model.dimensions.num_layers", "1000"],
        [("PB of memory", "model.dimensions")],
    ),
    "warm-up longer than the run": (
        None,
        [*NEW, "--training.scheduler.warmup_steps", "3"],
        [("training.scheduler", "3 steps", "take fewer")],
    ),
    "heads that do not fit": (
        None,
        [*NEW, "--model.attention.num_heads", "5"],
        [("command line", "num_heads (5)")],
    ),
    "context beyond the model's": (
        None,
        [*NEW, "--model.attention.max_position_embeddings", "8"],
        [("max_context_size", "max_position_embeddings", "lower the first or raise the second")],
    ),
    "overlap as long as the context": (
        None,
        [*NEW, DATA + "preprocessing.chunk_overlap", "16"],
        [("command line", "chunk_overlap (16)", "max_context_size (16)")],
    ),
    # the data
    "no training file named": (
        broken("name: new\n", "run.yaml"),
        TRAIN,
        [('"data.input_file" is missing', "name the JSON Lines file")],
    ),
    "no such training file": (
        None,
        [*NEW, DATA + "input_file", "no.jsonl"],
        [('"data.input_file"', "no.jsonl", "check the path")],
    ),
    "no such validation file": (
        None,
        [*NEW, DATA + "validation_file", "no.jsonl"],
        [('"data.validation_file"', "no.jsonl", "check the path")],
    ),
    "training file is a directory": (
        None,
        [*NEW, DATA + "input_file", "runs"],
        [("runs is a directory", "JSON Lines")],
    ),
    "training file is empty": (broken(""), NEW, [("text.jsonl", "no rows")]),
    "training file is cut": (broken(TEXT[:-5]), NEW, [("text.jsonl, line 20", "JSON")]),
    "a function that is not there": (
        None,
        [*NEW, DATA + "preprocess", "nowhere:clean"],
        [("data.preprocess", "nowhere")],
    ),
    "a function that fails": (
        broken("def clean(row): return row['txt']\n", "mine.py"),
        [*NEW, DATA + "preprocess", "mine.py:clean"],
        [("text.jsonl, line 1", "clean", "txt")],
    ),
    "another field": (broken('{"txt": "a"}\n'), NEW, [("text.jsonl, line 1", '"text"', '"txt"')]),
    "another encoding": (
        broken('{"text": "café"}\n'.encode("latin-1")),
        NEW,
        [("text.jsonl, line 1", "0xe9", "UTF-8")],
    ),
    "no tokenizer": (
        None,
        [*NEW, DATA + "tokenizer_path", "tok"],
        [("tok is not a tokenizer directory", "mlx-pretrain tokenizer --config")],
    ),
    "tokenizer is damaged": (
        broken(b"\x80" * 100, "tok/tokenizer.model"),
        [*NEW, DATA + "tokenizer_path", "tok"],
        [("tok/tokenizer.model",)],
    ),
    "vocabulary larger than the text": (
        None,
        ["tokenizer", "--config", "run.yaml", DATA + "tokenizer_path", "tok"],
        [("too small", "data.tokenizer.vocab_size")],
    ),
    "tokenizer over a run's": (
        None,
        ["tokenizer", "--config", "run.yaml", DATA + "tokenizer_path", "runs/run/tokenizer", "--overwrite"],
        [("runs/run/tokenizer", "choose another directory")],
    ),
    # the run
    "the run is there": (None, TRAIN, [("runs/run exists already", "overwrite: true")]),
    "something else is there": (
        broken("all my work", "runs/new/thesis.txt"),
        [*NEW, "--overwrite"],
        [("runs/new", "is not a run directory", "choose another")],
    ),
    "a name that leads elsewhere": (None, [*TRAIN, "--name", "../up"], [("'../up'", "choose another")]),
    "an absolute name": (None, [*TRAIN, "--name", "/tmp/up"], [("'/tmp/up'", "choose another")]),
    "an empty name": (None, [*TRAIN, "--name", ""], [("name", "empty")]),
    "a name of 300 letters": (None, [*TRAIN, "--name", "x" * 300], [("name", "choose another")]),
    "resume from nothing": (
        None,
        [*NEW, "--resume.checkpoint", "nothing"],
        [("nothing does not exist", "latest")],
    ),
    "resume from a file": (
        None,
        [*NEW, "--resume.checkpoint", "run.yaml"],
        [("run.yaml is a file", "latest")],
    ),
    "resume from a model": (
        None,
        [*NEW, "--resume.checkpoint", "runs/run/model"],
        [("holds a model", "latest")],
    ),
    "resume from a damaged checkpoint": (
        broken("{}", "runs/run/checkpoints/step_000003/state.json"),
        [*NEW, "--resume.checkpoint", "runs/run/checkpoints/step_000003"],
        [("state.json is damaged",)],
    ),
    "resume another model": (
        None,
        [*NEW, "--resume.checkpoint", "runs/run", "--model.dimensions.hidden_size", "32"],
        [("hidden_size was 16 and is 32",)],
    ),
    "resume with another optimizer": (
        None,
        [*NEW, "--resume.checkpoint", "runs/run", "--training.optimization.optimizer", "sgd"],
        [("optimizer.safetensors", "resume.reset_optimizer: true")],
    ),
    "resume beyond the end": (
        None,
        [*NEW, "--resume.checkpoint", "runs/run", HYPER + "iters", "2"],
        [("is at step 3", "ends at 2")],
    ),
    "generate from nothing": (None, ["generate", "--run", "nothing"], [("nothing",)]),
    "generate from a file": (None, ["generate", "--run", "run.yaml"], [("run.yaml",)]),
    "generate at a negative temperature": (
        None,
        ["generate", "--run", "run", "--temperature", "-1"],
        [("temperature",)],
    ),
    "model and vocabulary differ": (
        lambda: edit("runs/run/model/config.json", vocab_size=100),
        ["generate", "--run", "runs/run/model"],
        [("runs/run/model",)],
    ),
    "plot nothing": (None, ["plot"], [("at least one run",)]),
    "plot from nothing": (None, ["plot", "nothing"], [("nothing", "run directory")]),
    "plot what has no metrics": (
        lambda: Path("runs/run/metrics.jsonl").unlink(),
        ["plot", "run"],
        [("metrics.jsonl",)],
    ),
    "plot as text": (None, ["plot", "run", "--output", "a.txt"], [("a.txt", ".png")]),
    "plot onto a directory": (
        lambda: Path("a.png").mkdir(),
        ["plot", "run", "--output", "a.png"],
        [("a.png", "another place")],
    ),
}


def check(error, mistakes):
    "On the error stream: the program's name, and one line per mistake."
    assert error.startswith("mlx-pretrain: ") and error.endswith("\n") and "Traceback" not in error, error
    lines = error.removeprefix("mlx-pretrain: ").removesuffix("\n").split("\n")
    assert len(lines) == len(mistakes), error
    for line, pieces in zip(lines, mistakes, strict=True):
        for piece in pieces: assert piece in line, (piece, line)
        assert line.isprintable()


@pytest.mark.parametrize("case", MISTAKES)
def test_mistake_is_one_line_and_changes_no_file(here, capfd, case):
    prepare, args, mistakes = MISTAKES[case]
    if prepare: prepare()
    before = listing(here)
    code = main(args)
    out, error = capfd.readouterr()
    assert code == 2, (out, error)
    check(error, mistakes)
    assert out == ""
    assert listing(here) == before


@pytest.mark.parametrize("case", ["four mistakes, three in the file", "no such validation file",
                                  "the run is there", "plot from nothing"])
def test_real_process_prints_the_same(here, case):
    prepare, args, mistakes = MISTAKES[case]
    if prepare: prepare()
    before = listing(here)
    command = [sys.executable, str(ROOT / "train.py"),
               *args[1:]] if args[0] == "train" else [sys.executable, "-m", "mlx_pretrain", *args]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2 and done.stdout == "", done
    check(done.stderr, mistakes)
    assert listing(here) == before


def test_file_listing_detects_changes(here):
    "The check above can fail: an added file, a changed byte, a removed folder."
    before = listing(here)
    write("new", "")
    assert listing(here) != before
    Path("new").unlink()
    assert listing(here) == before
    write("text.jsonl", TEXT[:-1] + " ")
    assert listing(here) != before


def test_no_gpu_is_a_warning(here, capfd, caplog, monkeypatch):
    monkeypatch.setattr("mlx_pretrain.trainer.mx.is_available", lambda device: False)
    assert main([*NEW, "--system.device", "gpu"]) == 0
    assert [r.levelname for r in caplog.records if "gpu" in r.message] == ["WARNING"]
    assert is_run(Path("runs/new"))


def test_one_document_shorter_than_the_context(here, capfd):
    write("text.jsonl", '{"text": "Short."}\n')
    assert main([*NEW, "--data.preprocessing.max_context_size", "64"]) == 0
    metrics = [json.loads(line) for line in Path("runs/new/metrics.jsonl").read_text().splitlines()]
    losses = [m["loss"] for m in metrics if "loss" in m]
    assert losses and all(0 < loss < 7 for loss in losses)


def test_all_mistakes_are_reported_together(here, capfd):
    "A file is valid after fixing every reported line once."
    write(
        "run.yaml",
        YAML + "nmae: new\nsystem: {seed: '1', device: tpu}\nlogging: {steps: {logging_interval: 0}}\n",
    )
    assert main(TRAIN) == 2
    assert len(capfd.readouterr().err.splitlines()) == 4
    write(
        "run.yaml",
        YAML + "name: new\nsystem: {seed: 1, device: cpu}\nlogging: {steps: {logging_interval: 1}}\n",
    )
    assert main(TRAIN) == 0
