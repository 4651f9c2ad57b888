"""What it is worth to cut mini-batches of PPO to their own width: the same rollouts, cut and as wide as the
whole step.

    python benchmarks/ppo_step.py       the two take turns in one process; each in a first round that
    compiles, and in later ones
"""
import time

import mlx_pretrain  # noqa: F401, I001 (loads the BLAS, before MLX)

import mlx.core as mx
import numpy as np

from mlx_pretrain.core import rng_for
from mlx_pretrain.prompts import pad_prompt_response
from mlx_pretrain.model import Llama, LlamaArgs, ScalarLlama
from mlx_pretrain.optim import Optimization, make_optimizer
from mlx_pretrain.ppo import ActorCritic, ppo_loss
from mlx_pretrain.rollout import Minibatch, Rollout, minibatches
from mlx_pretrain.step import Update

SIZES = {"vocab_size": 2048, "hidden_size": 160, "intermediate_size": 448, "num_hidden_layers": 3,
         "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 80}
ROWS, SIZE, STEPS, ROUNDS = 32, 8, 6, 4
KNOBS = {"clip_range": 0.2, "temperature": 1.0}


def rollout(step):
    "Responses of some 30 tokens, a few of more than a hundred, as rows that bring their own have them."
    rng = rng_for(step, 0, "lengths")
    prompts, responses = ([rng.integers(3, 2048, n).tolist()
                           for n in np.minimum(rng.lognormal(mean, 0.8, ROWS).astype(int) + 2, 200)]
                          for mean in (2.8, 3.2))
    tokens, pad, mask = pad_prompt_response(prompts, responses, 0)
    numbers = (np.where(mask, rng.normal(-3, 1, mask.shape), 0).astype(np.float32) for _ in range(6))
    return Rollout(*map(mx.array, (tokens, pad, mask, *numbers)))


def as_they_are(rollout, order):
    scalars = [mx.array(number) for number in KNOBS.values()]
    return [Minibatch(Rollout(*(x[mx.array(order[i:i + SIZE])] for x in rollout)), *scalars)
            for i in range(0, ROWS, SIZE)]


def main():
    rollouts = [rollout(step) for step in range(STEPS)]
    ways = {"cut": lambda r, o: minibatches(r, o, SIZE, KNOBS), "whole": as_they_are}
    policies = {name: Llama(LlamaArgs(**SIZES)) for name in ways}
    both = {name: ActorCritic(p, ScalarLlama.from_llama(p)) for name, p in policies.items()}
    updates = {name: Update(model, make_optimizer(Optimization(), 1e-5, 0.0), ppo_loss(0.1, 0.2), 1.0,
                            clip_by_part=True) for name, model in both.items()}
    seconds = {name: [] for name in ways}
    for turn in range(ROUNDS):
        for name in (*ways,) if turn % 2 else (*ways,)[::-1]:
            start = time.perf_counter()
            for step, some in enumerate(rollouts):
                for batch in ways[name](some, rng_for(step, turn, "order").permutation(ROWS)):
                    mx.eval(updates[name]([batch], 1e-5))
            seconds[name].append((time.perf_counter() - start) / STEPS)
    for name, times in seconds.items():
        print(
            f"{name:<6} first round {times[0]:.2f}, later {min(times[1:]):.2f} seconds "
            f"per pass over {ROWS} rows"
        )
    print(
        f"as wide as the step takes {min(seconds['whole'][1:]) / min(seconds['cut'][1:]):.2f} times as long; "
        "in the first round "
        f"{seconds['whole'][0] / seconds['cut'][0]:.2f}"
    )


if __name__ == "__main__": main()
