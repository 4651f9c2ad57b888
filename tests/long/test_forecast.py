"The forecast on a machine where MLX has compiled nothing yet, compared with what the run then takes."
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

MODEL = "model: {dimensions: {hidden_size: 64, num_layers: 2}}\n"
TASKS = {
    "train": ("data: {input_file: text.jsonl, preprocessing: {max_context_size: 128}}\n" + MODEL, 150),
    "sft": ("data: {input_file: rows.jsonl}\n" + MODEL, 200),
    "rl": (
        "data: {input_file: rows.jsonl, response_length: 48}\n"
        "pretrained_model: runs/sft\nreward_model: taste.py:short\n",
        15,
    ),
}


def seconds(text):
    "The seconds in a forecast."
    units = {"s": 1, "min": 60, "h": 3600}
    return sum(float(n) * units[unit] for n, unit in re.findall(r"([\d.]+) (s|min|h)\b", text))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forecast")
    words = "the people of the united states are here and there again ".split()
    rows = [{"instruction": " ".join(words[: 1 + i % 11]) + "?",
             "response": " ".join(words[i % 5:] * (1 + i % 7))} for i in range(300)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": row["response"] * 3}) + "\n"
                                               for row in rows))
    (folder / "taste.py").write_text("def short(prompt, response): return -len(response)\n")
    for name, (yaml, steps) in TASKS.items():
        (folder / f"{name}.yaml").write_text(
            f"{yaml}training: {{hyperparameters: {{batch_size: 16, iters: {steps}}}}}\n"
        )
    return folder


@pytest.mark.parametrize("command", [
    name if name == "train" else pytest.param(name, marks=pytest.mark.nightly) for name in TASKS])
def test_forecast_with_an_empty_compiler_cache(command, home, tmp_path):
    "The forecast is right within a factor of two; on Linux a line explains the slow start."
    words = [sys.executable, "-u", "-m", "mlx_pretrain", command, "--config", f"{command}.yaml"]
    child = subprocess.Popen(words, cwd=home, env={**os.environ, "TMPDIR": str(tmp_path)},
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    lines, since = [], None
    for line in child.stdout:
        lines.append(line)
        if line.startswith("Estimated time: "):
            since, forecast = time.monotonic(), seconds(line.partition(",")[0])
    assert child.wait() == 0, child.stderr.read()
    real = time.monotonic() - since
    print(command, forecast, real)
    assert forecast / 2 < real < 2 * forecast, (forecast, real)
    assert any("Compiling for this machine" in line for line in lines) == (sys.platform == "linux"), lines
    rows = [json.loads(line) for line in Path(home, "runs", command,
                                              "metrics.jsonl").read_text().splitlines()]
    speeds = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
    assert speeds[0] > speeds[-1] / 4, speeds
