"The pretrained model of `make demo`, checked from its files. Run it after the demo."
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


def test_held_out_bits_per_byte_are_below_2_2_and_gzip(last, held_out):
    packed = gzip.compress("".join(held_out).encode(), 9)
    assert last["val_bits_per_byte"] < 2.2 < 8 * len(packed) / sum(len(text.encode()) for text in held_out)


def test_exported_model_has_the_logged_bits_per_byte(last, held_out):
    "The first 20,000 tokens, in shorter windows, by a softmax in NumPy; the window length matters a little."
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


def test_loss_falls_from_log_vocab_size(lines):
    assert abs(lines[0]["loss"] - math.log(load(RUN)[1].vocab_size)) < 0.3
    assert lines[-1]["loss"] < 0.65 * lines[0]["loss"]


def test_generated_words_are_known(held_out):
    model, tokenizer, *_ = load(RUN)
    texts = generate_text(model, tokenizer, ["My fellow Americans,", "We must"], max_new_tokens=60,
                          temperature=0.8)
    known = set(" ".join(held_out).split())
    words = " ".join(texts).split()[1:-1]
    assert len(words) > 40 and sum(word in known for word in words) / len(words) > 0.6


def test_all_files_exist():
    for name in ("config.yaml", "metadata.json", "logs/log.txt", "curve.png", "tokenizer/tokenizer.model",
                 "model/config.json",
                 "model/generation_config.json", "model/model.safetensors", "model/tokenizer.model"):
        assert (RUN / name).stat().st_size > 0, name
    assert json.loads((RUN / "metadata.json").read_text())["outcome"] == "finished"
    iters = load_config(PretrainConfig, RUN / "config.yaml").training.hyperparameters.iters
    assert checkpoints(RUN)[-1].name == f"step_{iters:06d}"


def test_interrupted_and_resumed_run_is_bit_identical(last):
    "Resumed from a checkpoint of the demo, interrupted by Ctrl-C, resumed again: same weights."
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
    "The last logged step of a run."
    try: return max((row["step"] for row in read_metrics(run)), default=0)
    except RunError: return 0
