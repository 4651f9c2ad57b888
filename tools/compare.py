"""Compare two models on the same held-out rows: loss of the responses, responses that end, and examples.

    python tools/compare.py runs/demo runs/demo-sft

The second is a fine-tuned run; rows and prompt format are those of its configuration.
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

MAX_TOKENS = 64  # of a response
N_EXAMPLES, WIDTH = 6, 100  # examples that are printed; characters of each


def answers(trainer):
    "Instruction and greedy response of each held-out row, and whether the response ended by itself."
    tok, prompts = trainer.tokenizer, trainer.questions
    out = generate(trainer.model, prompts, MAX_TOKENS, eos_ids=[tok.eos_id], pad_id=tok.pad_id, temperature=0)
    for ids, tokens, mask in zip(prompts, np.array(out.tokens), np.array(out.response_mask), strict=True):
        ended = bool((tokens == tok.eos_id).any())
        yield instruction(tok, ids, trainer.format.prompt_format), tok.decode(tokens[mask]), ended


def instruction(tok: Tokenizer, ids, template):
    "The instruction in a prompt."
    before, _, after = template.partition("{instruction}")
    return tok.decode(ids).split(before, 1)[-1].removesuffix(after)


def line(text): return " ".join(text.split())[:WIDTH]


def main(before, after):
    cfg = load_config(SFTConfig, Path(after) / "config.yaml")
    trainers = [SFTTrainer(cfg, load(path)) for path in (before, after)]
    if trainers[0].held_out is None or trainers[0].format is None:
        raise ConfigError(f"{after} has no validation_file, or no prompt format")
    losses = [trainer.evaluate()["val_loss"] for trainer in trainers]
    responses = [[*answers(trainer)] for trainer in trainers]
    ended = [sum(end for *_, end in rows) for rows in responses]
    pairs = [*zip(*responses, strict=True)]
    for (prompt, old, _), (_, new, _) in pairs[::max(1, len(pairs) // N_EXAMPLES)][:N_EXAMPLES]:
        print(f"\n  prompt  {line(prompt)}\n  before  {line(old)}\n  after   {line(new)}")
    print(f"\nOn {len(trainers[0].held_out)} held-out exchanges        before    after"
          f"\n  loss of the responses        {losses[0]:8.3f} {losses[1]:8.3f}"
          f"\n  responses with an end        {ended[0]:>8} {ended[1]:>8}   of {len(pairs)}")


if __name__ == "__main__":
    if len(sys.argv) != 3: sys.exit(__doc__)
    try: main(*sys.argv[1:])
    except UserError as e: sys.exit(str(e))
