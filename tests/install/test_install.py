"The package as a user installs it: built by `python -m build`, used in a new environment."
import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOT_SOURCE = (".git", ".venv*", "*.egg-info", "build", "dist", "data", "runs", "_*cache*", ".*_cache",
              "_exec", "_pages", "_proc", "_docs", "__pycache__")
YAML = """
data: {input_file: text.jsonl, preprocessing: {max_context_size: 16}}
model: {dimensions: {hidden_size: 16, num_layers: 1}}
training: {hyperparameters: {batch_size: 4, iters: 5}}
"""
COMMANDS = ("tokenizer", "train", "sft", "reward", "rl", "generate", "chat", "plot", "runs")


def run(*words, cwd):
    "Run a command as from a shell outside of this repository."
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "(source distribution, wheel), from a copy without the results of an earlier build."
    folder = tmp_path_factory.mktemp("build")
    shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(*NOT_SOURCE), symlinks=True)
    done = run(sys.executable, "-m", "build", str(folder / "source"), "--outdir", str(folder / "dist"),
               cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("dist/*.tar.gz")), next(folder.glob("dist/*.whl"))


class Environment:
    "A new environment, and an empty directory next to it."
    def __init__(self, folder):
        self.bin, self.empty = folder / "env" / "bin", folder / "empty"
        self.empty.mkdir()
        venv.create(folder / "env", with_pip=True)

    def install(self, what):
        done = run(self.bin / "python", "-m", "pip", "install", "--quiet", "--no-compile",
                   "--disable-pip-version-check", what, cwd=self.empty)
        assert done.returncode == 0, done.stderr

    def python(self, code): return run(self.bin / "python", "-c", code, cwd=self.empty)
    def command(self, *words): return run(self.bin / "mlx-pretrain", *words, cwd=self.empty)

    def check_version(self):
        done = self.command("--version")
        assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("mlx-pretrain "), done

    def check_training(self):
        "Five steps on a few lines, and one sentence for a missing configuration."
        self.check_version()
        (self.empty / "text.jsonl").write_text(
            "".join(json.dumps({"text": f"Line {i} of a short text."}) + "\n" for i in range(20))
        )
        (self.empty / "run.yaml").write_text(YAML)
        done = self.command("train", "--config", "run.yaml")
        assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
        metrics = (self.empty / "runs/run/metrics.jsonl").read_text().splitlines()
        assert (
            json.loads(metrics[-1])["step"] == 5
            and (self.empty / "runs/run/model/model.safetensors").is_file()
        )
        done = self.command("train", "--config", "model-config.yaml")
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "source code" in done.stderr, (
            done.stderr
        )


def test_contents(built):
    "The library and its build files; no tests, no notebooks, no configurations."
    modules = {f"mlx_pretrain/{path.name}" for path in (ROOT / "mlx_pretrain").glob("*.py")}
    with tarfile.open(built[0]) as archive: source = {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(built[1]) as archive: wheel = set(archive.namelist())
    assert {name for name in wheel if ".dist-info/" not in name} == modules
    assert any(name.endswith("LICENSE") for name in wheel)
    assert {name for name in source if name
            and "egg-info" not in name} == {*modules, "mlx_pretrain", "settings.ini", "setup.py", "setup.cfg",
                                            "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in",
                                            "PKG-INFO"}


def test_source_distribution(built, tmp_path):
    env = Environment(tmp_path)
    env.install(f"{built[0]}[cpu]")
    env.check_training()


def test_wheel(built, tmp_path):
    "On Linux first without an extra: one sentence, whose remedy is then followed."
    env, wheel = Environment(tmp_path), built[1]
    if sys.platform == "linux":
        env.install(str(wheel))
        env.check_version()
        assert env.command("--help").returncode == 0
        for command in COMMANDS:
            done = env.command(command)
            assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
            assert "mlx-pretrain[cpu]" in done.stderr and "mlx-pretrain[cuda]" in done.stderr, done.stderr
        done = env.python("import mlx_pretrain")
        assert (
            done.returncode == 0
            and done.stderr.count("mlx-pretrain[cpu]") == 1
            and "Traceback" not in done.stderr
        ), done.stderr
        done = env.python("import mlx_pretrain.model")
        assert (
            done.returncode == 1
            and "mlx-pretrain[cpu]" in done.stderr.splitlines()[-1]
            and "libmlx" not in done.stderr
        ), done.stderr
    # installed already: only what the extra adds
    env.install("mlx-pretrain[cpu]" if sys.platform == "linux" else str(wheel))
    env.check_training()
