"The commands as a user types them: what they do, and what they say when something is wrong."
import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_pretrain  # noqa: F401 (before MLX)
from mlx_pretrain.cli import main

ROOT = Path(__file__).resolve().parents[1]
YAML = """
data: {input_file: text.jsonl, preprocessing: {max_context_size: 16}}
model: {dimensions: {hidden_size: 16, num_layers: 1}}
training: {hyperparameters: {batch_size: 4, iters: 3}}
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.jsonl").write_text("".join(json.dumps({"text": f"Line {i} of a short text."}) + "\n" for i in range(20)))
    Path("run.yaml").write_text(YAML)
    return tmp_path


def broken(name, text): Path(name).write_text(text)


TRAIN = ["train", "--config", "run.yaml"]
MISTAKES = { # name: (what is wrong, command, what the sentence must say)
    "no command": (None, ["fly"], "no command 'fly'.*train"),
    "no config": (None, ["train"], "--config FILE"),
    "missing config": (None, ["train", "--config", "no.yaml"], "no.yaml"),
    "unknown key": (lambda: broken("run.yaml", YAML + "loging: {}\n"), TRAIN, r'run.yaml, line 5: "loging".*logging'),
    "value out of range": (None, [*TRAIN, "--training.hyperparameters.batch_size", "0"], "command line.*batch_size"),
    "no input file": (lambda: broken("run.yaml", "name: x\n"), TRAIN, r'"data.input_file" is missing'),
    "missing input file": (lambda: os.remove("text.jsonl"), TRAIN, "text.jsonl"),
    "bad JSON": (lambda: broken("text.jsonl", '{"text": "a"}\n{"text": "b"\n'), TRAIN, "text.jsonl, line 2"),
    "missing text": (lambda: broken("text.jsonl", '{"txt": "a"}\n'), TRAIN, 'text.jsonl, line 1.*"text"'),
    "no tokenizer": (None, [*TRAIN, "--data.tokenizer_path", "tok"], "tok.*mlx-pretrain tokenizer --config"),
    "tokenizer to nowhere": (None, ["tokenizer", "--config", "run.yaml"], '"data.tokenizer_path" is missing'),
    "tokenizer over a file": (None, ["tokenizer", "--config", "run.yaml", "--data.tokenizer_path", "text.jsonl"], "text.jsonl is a file"),
    "text too small": (None, ["tokenizer", "--config", "run.yaml", "--data.tokenizer_path", "tok"], "vocab_size|vocabulary"),
    "context beyond the model's": (None, [*TRAIN, "--model.attention.max_position_embeddings", "8"], "max_context_size"),
    "heads do not fit": (None, [*TRAIN, "--model.attention.num_heads", "5"], "num_heads"),
    "a path as a name": (None, [*TRAIN, "--name", "../up"], r"\.\./up"),
    "no such run": (None, ["generate", "--run", "nothing", "--prompt", "a"], "nothing"),
    "negative temperature": ("trained", ["generate", "--run", "run", "--temperature", "-1"], "temperature"),
    "prompt too long": ("trained", ["generate", "--run", "run", "--prompt", "a " * 2000], "2048|max_position"),
    "plot nothing": (None, ["plot"], "at least one run"),
    "plot no run": (None, ["plot", "nothing"], "nothing"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence(name, here, capfd):
    prepare, args, sentence = MISTAKES[name]
    if prepare == "trained": assert main(["train", "--config", "run.yaml"]) == 0
    elif prepare: prepare()
    before = sorted(str(p) for p in here.rglob("*"))
    capfd.readouterr()
    assert main(args) == 2
    err = capfd.readouterr().err
    assert "Traceback" not in err and re.search(sentence, err), err
    assert len([line for line in err.splitlines() if line.startswith("mlx-pretrain: ")]) == 1
    assert sorted(str(p) for p in here.rglob("*")) == before


def test_the_script_is_the_command(here):
    "The same run three ways, to the same weights."
    ways = {"script": [sys.executable, str(ROOT / "train.py")], "module": [sys.executable, "-m", "mlx_pretrain", "train"],
            "command": [str(Path(sys.executable).with_name("mlx-pretrain")), "train"]}
    for name, way in ways.items():
        done = subprocess.run([*way, "--config", "run.yaml", "--name", name], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    weights = {Path("runs", name, "model", "model.safetensors").read_bytes() for name in ways}
    assert len(weights) == 1


def test_overwrite_never_touches_a_runs_tokenizer(here, capfd):
    "A tokenizer inside a run, and a model's directory, stay as they are, whatever `overwrite` says."
    assert main(["train", "--config", "run.yaml"]) == 0
    for path in ("runs/run/tokenizer", "runs/run/model"):
        before = {p.name: p.read_bytes() for p in Path(path).iterdir()}
        args = ["--data.tokenizer_path", path, "--data.tokenizer.vocab_size", "290", "--overwrite"]
        assert main(["tokenizer", "--config", "run.yaml", *args]) == 2
        assert {p.name: p.read_bytes() for p in Path(path).iterdir()} == before
    made = ["tokenizer", "--config", "run.yaml", "--data.tokenizer_path", "tok", "--data.tokenizer.vocab_size", "290"]
    assert [main(made), main(made), main([*made, "--overwrite"])] == [0, 2, 0]


def test_two_dashes_among_the_flags_are_no_traceback(here, capfd):
    with contextlib.suppress(SystemExit): main(["train", "--config", "run.yaml", "--"])
    assert "Traceback" not in capfd.readouterr().err


def test_a_traceback_is_ours_only(here):
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), "--config", "nothing.yaml"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def test_a_config_is_found_in_configs(here, caplog):
    Path("configs").mkdir()
    os.rename("run.yaml", "configs/run.yaml")
    assert main(["train", "--config", "run.yaml"]) == 0
    assert "configs/run.yaml" in caplog.text


def test_an_existing_run_is_not_overwritten(here, capfd):
    assert main(["train", "--config", "run.yaml"]) == 0
    first = Path("runs/run/metrics.jsonl").read_bytes()
    assert main(["train", "--config", "run.yaml", "--system.seed", "7"]) == 2
    assert Path("runs/run/metrics.jsonl").read_bytes() == first and "overwrite" in capfd.readouterr().err
    assert main(["train", "--config", "run.yaml", "--system.seed", "7", "--overwrite"]) == 0
    assert Path("runs/run/metrics.jsonl").read_bytes() != first


def test_a_name_with_blanks_and_brackets(here, capfd):
    assert main(["train", "--config", "run.yaml", "--name", "Llama (2M)"]) == 0
    capfd.readouterr()
    assert main(["generate", "--run", "runs/Llama (2M)", "--prompt", "Line", "--max_new_tokens", "5"]) == 0
    assert capfd.readouterr().out.startswith("Line")
    assert main(["train", "--config", "run.yaml", "--name", "next", "--data.tokenizer_path", "runs/Llama (2M)/tokenizer"]) == 0


@pytest.mark.parametrize("config", sorted(p.name for p in (ROOT / "configs").glob("*.yaml")))
def test_the_configs_are_valid(config):
    from mlx_pretrain.config import load_config
    from mlx_pretrain.model import parameter_count
    from mlx_pretrain.pretrain import PretrainConfig
    cfg = load_config(PretrainConfig, ROOT / "configs" / config)
    if cfg.name == "Llama (2M)":
        assert 1.8e6 < parameter_count(cfg.model.args(cfg.data.tokenizer.vocab_size)) < 2.2e6
        assert cfg.data.preprocessing.max_context_size >= 1024
