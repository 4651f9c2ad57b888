"""Write pairs of answers for a reward model: data/preferences/train.jsonl and val.jsonl.

    python tools/preferences.py runs/demo-sft

A fine-tuned model answers each prompt of its own data several times. Who prefers what is decided by VADER, the stand-in for people: the
friendlier of two answers is chosen. Pairs that sound alike to it are left out. pip install vaderSentiment.
"""
import json
import sys
from pathlib import Path

import mlx_pretrain  # noqa: F401, I001 (before MLX)

import numpy as np

from mlx_pretrain.config import UserError, load_config
from mlx_pretrain.generate import generate, text_after
from mlx_pretrain.pretrained import load
from mlx_pretrain.prompt import prompt_ids
from mlx_pretrain.rules import Sentiment
from mlx_pretrain.score import score
from mlx_pretrain.sft import SFTConfig

SAMPLES, LONGEST, LEAST = 8, 32, 0.2  # answers to a question; tokens of one; difference in sentiment from which on a pair counts


def answers(policy, asked, seed):
    "What the policy says to each of some questions."
    model, tok, _, fmt = policy
    prompts = [prompt_ids(tok, fmt.ask(question)) for question in asked]
    out = generate(model, prompts, LONGEST, eos_ids=[tok.eos_id], pad_id=tok.pad_id, seed=seed, batch_size=256)
    rows = [row[mask].tolist() for row, mask in zip(np.array(out.tokens), np.array(out.response_mask), strict=True)]
    return [fmt.unwrap(text_after(tok, p, r)) for p, r in zip(prompts, rows, strict=True)]


def pairs(asked, said, friendly):
    "For each question the friendliest answer beside the least friendly one, the second beside the last but one, and so on."
    for question, answers, values in zip(asked, said, friendly, strict=True):
        order = np.argsort(values, kind="stable")
        for low, high in zip(order[:len(order) // 2], order[::-1], strict=False):
            if values[high] - values[low] >= LEAST: yield {"instruction": question, "chosen": answers[high], "rejected": answers[low]}


def main(run, folder=Path("data/preferences")):
    policy, cfg = load(run), load_config(SFTConfig, Path(run) / "config.yaml")
    folder.mkdir(parents=True, exist_ok=True)
    for n, (name, file) in enumerate((("train", cfg.data.input_file), ("val", cfg.data.validation_file))):
        lines = Path(file).read_text(encoding="utf-8").splitlines()
        asked = [*dict.fromkeys(json.loads(line)["instruction"] for line in lines)]
        said = [answers(policy, asked, seed=SAMPLES * n + i) for i in range(SAMPLES)]     # SAMPLES × questions
        friendly = np.array([score(Sentiment(), asked, some) for some in said]).T         # questions × SAMPLES
        rows = [*pairs(asked, [*zip(*said, strict=True)], friendly)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        print(f"{folder / name}.jsonl: {len(rows)} pairs, from {SAMPLES} answers to each of {len(asked)} questions")


if __name__ == "__main__":
    if len(sys.argv) != 2: sys.exit(__doc__)
    try: main(*sys.argv[1:])
    except UserError as e: sys.exit(str(e))
