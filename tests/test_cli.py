"Commands as a user types them: results, and messages for mistakes."
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_pretrain  # noqa: F401, I001 (before MLX)

from common import check_sentence
from mlx_pretrain.cli import main
from mlx_pretrain.config import load_config
from mlx_pretrain.ppo import PPOConfig
from mlx_pretrain.pretrain import PretrainConfig
from mlx_pretrain.reward import RewardConfig
from mlx_pretrain.sft import SFTConfig
from mlx_pretrain.run import checkpoints, read_metrics

ROOT = Path(__file__).resolve().parents[1]
YAML = """
data: {input_file: text.jsonl, preprocessing: {max_context_size: 16}}
model: {dimensions: {hidden_size: 16, num_layers: 1}}
training: {hyperparameters: {batch_size: 4, iters: 3}}
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.jsonl").write_text("".join(json.dumps({"text": f"Line {i} of a short text."}) + "\n"
                                          for i in range(20)))
    Path("run.yaml").write_text(YAML)
    return tmp_path


def test_script_and_command_are_equal(here):
    "The same run three ways, to the same weights."
    ways = {"script": [sys.executable, str(ROOT / "train.py")],
            "module": [sys.executable, "-m", "mlx_pretrain", "train"],
            "command": [str(Path(sys.executable).with_name("mlx-pretrain")), "train"]}
    for name, way in ways.items():
        done = subprocess.run([*way, "--config", "run.yaml", "--name", name], capture_output=True, text=True,
                              check=False)
        assert done.returncode == 0, done.stderr
    weights = {Path("runs", name, "model", "model.safetensors").read_bytes() for name in ways}
    assert len(weights) == 1


def test_overwrite_keeps_a_runs_tokenizer(here, capfd):
    "A tokenizer inside a run, and a model's directory, are never overwritten."
    assert main(["train", "--config", "run.yaml"]) == 0
    for path in ("runs/run/tokenizer", "runs/run/model"):
        before = {p.name: p.read_bytes() for p in Path(path).iterdir()}
        args = ["--data.tokenizer_path", path, "--data.tokenizer.vocab_size", "290", "--overwrite"]
        assert main(["tokenizer", "--config", "run.yaml", *args]) == 2
        assert {p.name: p.read_bytes() for p in Path(path).iterdir()} == before
    made = ["tokenizer", "--config", "run.yaml", "--data.tokenizer_path", "tok",
            "--data.tokenizer.vocab_size", "290"]
    assert [main(made), main(made), main([*made, "--overwrite"])] == [0, 2, 0]


def test_double_dash_gives_no_traceback(here, capfd):
    assert main(["train", "--config", "run.yaml", "--"]) == 2
    assert "Traceback" not in capfd.readouterr().err


def test_null_on_command_line_is_default(here):
    Path("run.yaml").write_text(YAML + "system: {seed: 7}\n")
    assert main(["train", "--config", "run.yaml", "--system.seed", "null",
                 "--data.validation_file=null"]) == 0
    assert load_config(PretrainConfig, "runs/run/config.yaml").system.seed == PretrainConfig().system.seed


def test_interrupt_and_resume_by_command(here, capfd):
    "Ctrl-C prints how to resume, the command resumes, and the table of runs shows both states."
    train = [sys.executable, str(ROOT / "train.py"), "--config", "run.yaml",
             "--training.hyperparameters.iters", "3000"]
    child = subprocess.Popen(train, stderr=subprocess.PIPE, text=True)
    while not Path("runs/run/metrics.jsonl").exists(): assert child.poll() is None
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130 and "--resume.checkpoint latest" in err
    assert main(["runs"]) == 0 and "interrupted" in capfd.readouterr().out
    stopped = int(checkpoints("runs/run")[-1].name.removeprefix("step_"))
    longer = ["--training.hyperparameters.iters", str(stopped + 3), "--resume.checkpoint", "latest"]
    assert main(["train", "--config", "run.yaml", *longer]) == 0
    assert read_metrics("runs/run")[-1]["step"] == stopped + 3
    assert main(["runs"]) == 0 and "finished" in capfd.readouterr().out


def test_missing_config_gives_no_traceback(here):
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), "--config", "nothing.yaml"],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


@pytest.mark.linux
def test_without_mlx_backend(tmp_path):
    "With `pip install mlx` alone on Linux, what needs no MLX works, the rest prints what to install."
    import mlx.core
    (tmp_path / "mlx").mkdir()
    shutil.copy(mlx.core.__file__, tmp_path / "mlx")
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    def python(*words):
        return subprocess.run([sys.executable, *words], env=env, capture_output=True, text=True, check=False)
    for way in (["-m", "mlx_pretrain"], [str(ROOT / "train.py")]):
        done = python(*way, "train" if "-m" in way else "--help")
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        check_sentence(done.stderr.strip(), "mlx-pretrain[cpu]", "mlx-pretrain[cuda]")
    done = python("-m", "mlx_pretrain", "--version")
    assert done.returncode == 0 and not done.stderr and done.stdout.startswith("mlx-pretrain ")
    done = python("-c", "import mlx_pretrain")
    assert (
        done.returncode == 0 and done.stderr.count("mlx-pretrain[cpu]") == 1 and "<string>:1" in done.stderr
    ), done.stderr
    done = python("-c", "import mlx_pretrain.model")
    assert done.returncode == 1 and "mlx-pretrain[cpu]" in done.stderr.splitlines()[-1], done.stderr


def test_config_is_found_in_configs(here, caplog):
    Path("configs").mkdir()
    os.rename("run.yaml", "configs/run.yaml")
    assert main(["train", "--config", "run.yaml"]) == 0
    assert "configs/run.yaml" in caplog.text


def test_missing_example_config(here, capfd):
    "The package contains no configurations; the error for a known name says where they are."
    assert main(["train", "--config", "model-config.yaml"]) == 2
    check_sentence(capfd.readouterr().err.strip(), "model-config.yaml", "source code")


def test_existing_run_is_not_overwritten(here, capfd):
    assert main(["train", "--config", "run.yaml"]) == 0
    first = Path("runs/run/metrics.jsonl").read_bytes()
    assert main(["train", "--config", "run.yaml", "--system.seed", "7"]) == 2
    assert Path("runs/run/metrics.jsonl").read_bytes() == first and "overwrite" in capfd.readouterr().err
    assert main(["train", "--config", "run.yaml", "--system.seed", "7", "--overwrite"]) == 0
    assert Path("runs/run/metrics.jsonl").read_bytes() != first


def test_name_with_spaces_and_parentheses(here, capfd):
    assert main(["train", "--config", "run.yaml", "--name", "Llama (2M)"]) == 0
    capfd.readouterr()
    assert main(["generate", "--run", "runs/Llama (2M)", "--prompt", "Line", "--max_new_tokens", "5"]) == 0
    assert capfd.readouterr().out.startswith("Line")
    assert main(["train", "--config", "run.yaml", "--name", "next", "--data.tokenizer_path",
                 "runs/Llama (2M)/tokenizer"]) == 0


@pytest.mark.parametrize("config", sorted(p.name for p in (ROOT / "configs").glob("*.yaml")))
def test_configs_are_valid(config):
    from mlx_pretrain.model import parameter_count
    kinds = {"reward": RewardConfig, "sft": SFTConfig, "chat": SFTConfig, "rl": PPOConfig}
    cfg = load_config(next((kind for word, kind in kinds.items() if word in config), PretrainConfig),
                      ROOT / "configs" / config)
    if cfg.name == "Llama (2M)":
        assert 1.8e6 < parameter_count(cfg.model.args(cfg.data.tokenizer.vocab_size)) < 2.2e6
        assert cfg.data.preprocessing.max_context_size >= 1024
