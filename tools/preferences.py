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

from mlx_pretrain.config import ConfigError, UserError, load_config
from mlx_pretrain.generate import generate_text
from mlx_pretrain.pretrained import find_model, load
from mlx_pretrain.prompt import prompt_ids
from mlx_pretrain.rules import Sentiment
from mlx_pretrain.score import score
from mlx_pretrain.sft import SFTConfig

SAMPLES = 8  # answers to a question; tokens of one; difference in sentiment from which on a pair counts
LONGEST = 32
LEAST = 0.2


def answers(policy, questions, seed):
    "What the policy says to each of some questions."
    model, tok, _, fmt = policy
    prompts = [prompt_ids(tok, fmt.format_question(question)) for question in questions]
    return [*map(fmt.parse_response, generate_text(model, tok, prompts, LONGEST, seed=seed, batch_size=256))]


def pairs(questions, said, friendly):
    "For each question the friendliest answer beside the least friendly one, the second beside the last but one, and so on."
    for question, some, values in zip(questions, said, friendly, strict=True):
        order = np.argsort(values, kind="stable")
        for low, high in zip(order[:len(order) // 2], order[::-1], strict=False):
            if values[high] - values[low] >= LEAST:
                yield {"prompt": question, "chosen": some[high], "rejected": some[low]}


def main(run, folder=Path("data/preferences")):
    policy, cfg = load(run), load_config(SFTConfig, find_model(run) / "config.yaml").data
    if policy.format is None: raise ConfigError(f"{run} was not taught to answer; name a fine-tuned run")
    if cfg.validation_file is None:
        raise ConfigError(f'{run} has no "data.validation_file", from which the held-out pairs would come')
    folder.mkdir(parents=True, exist_ok=True)
    for n, (name, file) in enumerate((("train", cfg.input_file), ("val", cfg.validation_file))):
        rows = (json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines())
        questions = [*dict.fromkeys(row[policy.format.input_field] for row in rows)]
        # SAMPLES × questions
        said = [answers(policy, questions, seed=SAMPLES * n + i) for i in range(SAMPLES)]
        friendly = np.array([score(Sentiment(), questions, some) for some in said]).T  # questions × SAMPLES
        found = [*pairs(questions, [*zip(*said, strict=True)], friendly)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n"
                                                      for row in found), encoding="utf-8")
        print(
            f"{folder / name}.jsonl: {len(found)} pairs, from {SAMPLES} answers to each of {len(questions)} questions"
        )


if __name__ == "__main__":
    if len(sys.argv) != 2: sys.exit(__doc__)
    try: main(*sys.argv[1:])
    except UserError as e: sys.exit(str(e))
