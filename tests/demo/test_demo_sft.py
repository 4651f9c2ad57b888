"The fine-tuned model of `make demo`, evaluated independently of the trainer."
import json
import re
from pathlib import Path

import mlx_pretrain  # noqa: F401, I001 (before MLX)

import mlx.core as mx
import numpy as np
import pytest

from mlx_pretrain.generate import generate
from mlx_pretrain.prompt import prompt_ids
from mlx_pretrain.pretrained import load
from mlx_pretrain.run import checkpoints, read_metadata, read_metrics

BASE, RUN = Path("runs/demo"), Path("runs/demo-sft")
TRAIN, VAL = (Path("data/exchanges", f"{name}.jsonl") for name in ("train", "val"))


@pytest.fixture(scope="module")
def tuned(): return load(RUN)


def rows(path): return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def response_loss(model, tok, fmt, context=128):
    "Nats per trained token over the held-out rows, each alone, by a softmax in NumPy."
    nats, count = 0.0, 0
    for row in rows(VAL):
        read = prompt_ids(tok, fmt.format_question(row["instruction"]))
        response = [*tok.encode(" " + row["response"]), tok.eos_id]
        ids = read + response
        if len(ids) > context: continue
        logits = np.array(model(mx.array([ids[:-1]]))[0], np.float64)
        logp = logits - logits.max(-1, keepdims=True)
        logp -= np.log(np.exp(logp).sum(-1, keepdims=True))
        nats -= logp[np.arange(len(read) - 1, len(ids) - 1), response].sum()
        count += len(response)
    return nats / count


def test_held_out_loss_fell(tuned):
    after = response_loss(tuned.model, tuned.tokenizer, tuned.format)
    assert abs(after - read_metrics(RUN)[-1]["val_loss"]) < 1e-3
    assert after < 4.3 < 5.2 < response_loss(load(BASE).model, tuned.tokenizer, tuned.format)


def test_fine_tuned_model_writes_eos_and_the_base_does_not(tuned):
    tok, asked = tuned.tokenizer, dict.fromkeys(row["instruction"] for row in rows(VAL))
    prompts = [prompt_ids(tok, tuned.format.format_question(question)) for question in asked]

    def stops(model):
        out = np.array(generate(model, prompts, 64, eos_ids=[tok.eos_id], pad_id=tok.pad_id,
                                temperature=0).tokens)
        return (out == tok.eos_id).any(axis=1).mean()
    assert stops(tuned.model) > 0.8 and stops(load(BASE).model) < 0.1


def test_no_prompt_is_in_both_files():
    def spelt(path): return {" ".join(re.findall(r"\w+", row["instruction"].lower())) for row in rows(path)}
    assert not spelt(TRAIN) & spelt(VAL) and len(rows(VAL)) > 50
    pairs = [(row["instruction"], row["response"]) for path in (TRAIN, VAL) for row in rows(path)]
    assert len(set(pairs)) == len(pairs)


def test_row_counts_are_recorded():
    counts = read_metadata(RUN)["data"]["input_file"]
    assert counts["rows"] == len(rows(TRAIN)) == counts["kept"] + counts["dropped"]
    assert counts["skipped"] == counts["truncated"] == 0
    log = (RUN / "logs" / "log.txt").read_text(encoding="utf-8")
    assert f"{counts['rows']:,} rows, {counts['kept']:,} kept" in log and log.count("### Response:") >= 3


def test_the_best_checkpoint_is_kept():
    best = read_metadata(RUN)["best"]
    assert best["val_loss"] == min(line["val_loss"] for line in read_metrics(RUN) if "val_loss" in line)
    assert f"step_{best['step']:06d}" in [path.name for path in checkpoints(RUN)]
    assert (RUN / "curve.png").stat().st_size > 0
