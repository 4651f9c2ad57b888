"""Write preference pairs for a reward model: data/preferences/train.jsonl and val.jsonl.

    python tools/preferences.py runs/demo-sft

A fine-tuned model answers each prompt of its own data several times. VADER sentiment stands in for human
preferences: the friendlier of two answers is chosen. Pairs of similar sentiment are left out.
pip install vaderSentiment.
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

SAMPLES = 8 # answers per question
MAX_TOKENS = 32 # per answer
MIN_DIFFERENCE = 0.2 # in sentiment, between the answers of a pair


def answers(policy, questions, seed):
    "The policy's answer to each question."
    model, tok, _, fmt = policy
    prompts = [prompt_ids(tok, fmt.format_question(question)) for question in questions]
    texts = generate_text(model, tok, prompts, MAX_TOKENS, seed=seed, batch_size=256)
    return [*map(fmt.parse_response, texts)]


def pairs(questions, responses, sentiment):
    "Per question, the friendliest answer with the least friendly one, the second with the last but one, etc."
    for question, texts, values in zip(questions, responses, sentiment, strict=True):
        order = np.argsort(values, kind="stable")
        for low, high in zip(order[:len(order) // 2], order[::-1], strict=False):
            if values[high] - values[low] >= MIN_DIFFERENCE:
                yield {"prompt": question, "chosen": texts[high], "rejected": texts[low]}


def main(run, folder=Path("data/preferences")):
    policy, cfg = load(run), load_config(SFTConfig, find_model(run) / "config.yaml").data
    if policy.format is None: raise ConfigError(f"{run} is not fine-tuned; name a fine-tuned run")
    if cfg.validation_file is None:
        raise ConfigError(f'{run} has no "data.validation_file", from which the held-out pairs would come')
    folder.mkdir(parents=True, exist_ok=True)
    for n, (name, file) in enumerate((("train", cfg.input_file), ("val", cfg.validation_file))):
        rows = (json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines())
        questions = [*dict.fromkeys(row[policy.format.input_field] for row in rows)]
        # SAMPLES × questions
        responses = [answers(policy, questions, seed=SAMPLES * n + i) for i in range(SAMPLES)]
        scores = [score(Sentiment(), questions, texts) for texts in responses]
        preferences = [*pairs(questions, [*zip(*responses, strict=True)], np.array(scores).T)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n"
                                                      for row in preferences), encoding="utf-8")
        print(f"{folder / name}.jsonl: {len(preferences)} pairs, "
              f"from {SAMPLES} answers to each of {len(questions)} questions")


if __name__ == "__main__":
    if len(sys.argv) != 2: sys.exit(__doc__)
    try: main(*sys.argv[1:])
    except UserError as e: sys.exit(str(e))
