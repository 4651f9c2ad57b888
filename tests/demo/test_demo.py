"What `make demo` left behind: judged from the files alone. Run it after the demo."
import gzip
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import mlx_pretrain  # noqa: F401 (before MLX)
from mlx_pretrain.config import load_config
from mlx_pretrain.data import read_texts
from mlx_pretrain.generate import generate_text
from mlx_pretrain.pretrain import PretrainConfig
from mlx_pretrain.pretrained import load
from mlx_pretrain.run import RunError, checkpoints, read_metrics

RUN = Path("runs/demo")


@pytest.fixture(scope="module")
def held_out(): return list(read_texts("data/sotu/val.jsonl"))


@pytest.fixture(scope="module")
def lines(): return [line for line in read_metrics(RUN) if "event" not in line]


@pytest.fixture(scope="module")
def last(lines): return [line for line in lines if "val_bits_per_byte" in line][-1]


def test_below_two_point_two_bits_per_byte(last, held_out):
    packed = gzip.compress("".join(held_out).encode(), 9)
    assert last["val_bits_per_byte"] < 2.2 < 8 * len(packed) / sum(len(text.encode()) for text in held_out)


def test_measured_again_from_the_exported_model(last, held_out):
    "Every token of the first 20,000, in windows of another size, by a softmax in NumPy; longer windows help, shorter ones hurt, a little."
    model, tokenizer, *_ = load(RUN)
    ids = [tokenizer.bos_id, *tokenizer.encode(held_out[0])][:20_001]
    import mlx.core as mx
    nats = 0.0
    for start in range(0, len(ids) - 1, 64):
        window = ids[start : start + 65]
        logits = np.array(model(mx.array([window[:-1]]))[0], dtype=np.float64)
        logits -= logits.max(-1, keepdims=True)
        nats -= (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[
            np.arange(len(window) - 1), window[1:]
        ].sum()
    bits = nats / math.log(2) / len(tokenizer.decode(ids).encode())
    assert abs(bits - last["val_bits_per_byte"]) < 0.15


def test_the_loss_fell_from_the_logarithm_of_the_vocabulary(lines):
    assert abs(lines[0]["loss"] - math.log(load(RUN)[1].vocab_size)) < 0.3
    assert lines[-1]["loss"] < 0.65 * lines[0]["loss"]


def test_it_writes(held_out):
    model, tokenizer, *_ = load(RUN)
    texts = generate_text(model, tokenizer, ["My fellow Americans,", "We must"], max_new_tokens=60,
                          temperature=0.8)
    known = set(" ".join(held_out).split())
    words = " ".join(texts).split()[1:-1]
    assert len(words) > 40 and sum(word in known for word in words) / len(words) > 0.6


def test_all_files_are_there():
    for name in ("config.yaml", "metadata.json", "logs/log.txt", "curve.png", "tokenizer/tokenizer.model", "model/config.json",
                 "model/generation_config.json", "model/model.safetensors", "model/tokenizer.model"):
        assert (RUN / name).stat().st_size > 0, name
    assert json.loads((RUN / "metadata.json").read_text())["outcome"] == "finished"
    iters = load_config(PretrainConfig, RUN / "config.yaml").training.hyperparameters.iters
    assert checkpoints(RUN)[-1].name == f"step_{iters:06d}"


def test_interrupted_and_gone_on_with(last):
    "From one of the demo's checkpoints, stopped by Ctrl-C on the way and gone on with: the demo's own bits per byte, and its weights."
    again = Path("runs/demo-again")
    shutil.rmtree(again, ignore_errors=True)
    train = [sys.executable, "train.py", "--config", "configs/demo.yaml", "--name", again.name,
             "--resume.checkpoint"]
    cut = subprocess.Popen([*train, RUN / "checkpoints" / "step_001050"])
    try:
        while cut.poll() is None and reached(again) < 1100: time.sleep(0.1)
        cut.send_signal(signal.SIGINT)
        assert cut.wait(60) == 130
    finally: cut.kill()
    stopped = int(checkpoints(again)[-1].name.removeprefix("step_"))
    assert 1100 <= stopped < 1400
    subprocess.run([*train, "latest"], check=True)
    rows = read_metrics(again)
    assert [row["step"] for row in rows if row.get("event") == "resume"] == [1050, stopped]
    assert rows[-1]["val_bits_per_byte"] == last["val_bits_per_byte"]
    assert (again / "model" / "model.safetensors").read_bytes() == (
        RUN / "model" / "model.safetensors"
    ).read_bytes()
    shutil.rmtree(again)


def reached(run):
    "The last step that a run has logged."
    try: return max((row["step"] for row in read_metrics(run)), default=0)
    except RunError: return 0
