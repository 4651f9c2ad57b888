"""What rows of like length, and a head at trained places only, are worth in fine-tuning: one epoch of the same rows in three ways.

    python benchmarks/sft_step.py       the three take turns in one process, epoch by epoch; the fastest of each, and ratios
"""
import time

import mlx_pretrain  # noqa: F401, I001 (loads the BLAS, before MLX)

import mlx.core as mx
import numpy as np

from mlx_pretrain.core import rng_for
from mlx_pretrain.data import Batch
from mlx_pretrain.model import Llama, LlamaArgs
from mlx_pretrain.pretrain import next_token_loss
from mlx_pretrain.rows import SFTDataset
from mlx_pretrain.sampler import epoch_batches
from mlx_pretrain.sft import response_loss
from mlx_pretrain.trainer import Trainer

SIZES = {"vocab_size": 8192, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4,
         "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64}
ROWS, BATCH, ROUNDS = 128, 8, 3


def rows_of_many_lengths():
    "Prompts and responses of some 40 tokens each, a few of hundreds, as instruction data have them."
    rng = rng_for(0, 0, "lengths")
    prompts, responses = (np.minimum(rng.lognormal(3.5, 0.8, ROWS).astype(int) + 2, 400) for _ in range(2))
    ends = np.cumsum([0, *(prompts + responses)])
    trained = np.arange(ends[-1]) >= np.repeat(ends[:-1] + prompts, np.diff(ends))
    return SFTDataset(rng.integers(0, SIZES["vocab_size"], ends[-1]), trained, ends, prompts, pad_id=0)


def whole(batch):
    "The same batch with a head at every place."
    size, shape = batch.inputs.size, batch.inputs.shape
    spots = mx.where(batch.loss_mask, batch.positions, size)  # what fills up goes to a place that is cut off
    targets = mx.zeros(size + 1, mx.int32).at[spots].add(batch.targets)[:-1]
    mask = mx.zeros(size + 1, mx.int32).at[spots].add(1)[:-1] > 0
    return Batch(batch.inputs, targets.reshape(shape), mask.reshape(shape))


def main():
    rows = rows_of_many_lengths()
    drawn = rng_for(0, 0, "order").permutation(ROWS).reshape(-1, BATCH)
    steps, alike = len(drawn), [epoch_batches(rows.lengths, BATCH, 0, epoch) for epoch in range(ROUNDS + 1)]
    def of_like_length(step): return rows.batch(alike[step // steps][step % steps])
    ways = {"as they come, head everywhere": (next_token_loss,
                                              lambda step: whole(rows.batch(drawn[step % steps]))),
            "like length, head everywhere": (next_token_loss, lambda step: whole(of_like_length(step))),
            "like length, head where trained": (response_loss, of_like_length), }
    trainers = {name: Trainer(Llama(LlamaArgs(**SIZES)), loss, draw, (ROUNDS + 1) * steps)
                for name, (loss, draw) in ways.items()}
    seconds = {name: [] for name in ways}
    for turn in range(ROUNDS + 1):
        for name in (*ways,) if turn % 2 else (*ways,)[::-1]:
            start = time.perf_counter()
            for _ in range(steps): trainers[name].step()
            if turn: seconds[name].append(time.perf_counter() - start)       # the first epoch compiles
    fastest = {name: min(times) for name, times in seconds.items()}
    ours = fastest["like length, head where trained"]
    for name, time_taken in fastest.items():
        print(f"{name:32} {time_taken:6.2f} s an epoch, {time_taken / ours:.2f} times ours")


if __name__ == "__main__": main()
