"""Two models on the same held-out rows: the loss of the responses, how many answers end by themselves, and some of them side by side.

    python tools/compare.py runs/demo runs/demo-sft        the second is a fine-tuned run; its configuration says which rows, and how to ask
"""
import sys
from pathlib import Path

import mlx_pretrain  # noqa: F401, I001 (before MLX)

import numpy as np

from mlx_pretrain.config import ConfigError, UserError, load_config
from mlx_pretrain.generate import generate
from mlx_pretrain.pretrained import load
from mlx_pretrain.sft import SFTConfig, SFTTrainer
from mlx_pretrain.tokenizer import Tokenizer

LONGEST, SHOWN, WIDTH = 64, 6, 100  # tokens of an answer; answers; characters of each


def answers(trainer):
    "Prompts and likeliest answers on the held-out rows: text, and did it end by itself?"
    tok, prompts = trainer.tokenizer, trainer.questions
    out = generate(trainer.model, prompts, LONGEST, eos_ids=[tok.eos_id], pad_id=tok.pad_id, temperature=0)
    for ids, tokens, mask in zip(prompts, np.array(out.tokens), np.array(out.response_mask), strict=True):
        yield (
            asked(tok, ids, trainer.format.prompt_format),
            tok.decode(tokens[mask]),
            bool((tokens == tok.eos_id).any()),
        )


def asked(tok: Tokenizer, ids, template):
    "The instruction in a prompt."
    before, _, after = template.partition("{instruction}")
    return tok.decode(ids).split(before, 1)[-1].removesuffix(after)


def line(text): return " ".join(text.split())[:WIDTH]


def main(before, after):
    cfg = load_config(SFTConfig, Path(after) / "config.yaml")
    trainers = [SFTTrainer(cfg, load(path)) for path in (before, after)]
    if trainers[0].held_out is None or trainers[0].format is None:
        raise ConfigError(f"{after} has no held-out rows to answer")
    losses = [trainer.evaluate()["val_loss"] for trainer in trainers]
    said = [[*answers(trainer)] for trainer in trainers]
    ended = [sum(end for *_, end in rows) for rows in said]
    for (prompt, old, _), (_, new, _) in [*zip(*said, strict=True)][:: max(1, len(said[0]) // SHOWN)][:SHOWN]:
        print(f"\n  asked   {line(prompt)}\n  before  {line(old)}\n  after   {line(new)}")
    print(f"\nOn {len(trainers[0].held_out)} held-out exchanges        before    after"
          f"\n  loss of the responses        {losses[0]:8.3f} {losses[1]:8.3f}"
          f"\n  answers that end themselves  {ended[0]:>8} {ended[1]:>8}   of {len(said[0])}")


if __name__ == "__main__":
    if len(sys.argv) != 3: sys.exit(__doc__)
    try: main(*sys.argv[1:])
    except UserError as e: sys.exit(str(e))
