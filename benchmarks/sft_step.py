"""Speedup of fine-tuning by length-grouped batches, and by applying the head at trained positions only.

    python benchmarks/sft_step.py

Three variants train the same rows in turns, in one process; prints the fastest epoch of each, and ratios.
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


def make_rows():
    "Prompts and responses of about 40 tokens, some with hundreds, as in instruction data."
    rng = rng_for(0, 0, "lengths")
    prompts, responses = (np.minimum(rng.lognormal(3.5, 0.8, ROWS).astype(int) + 2, 400) for _ in range(2))
    ends = np.cumsum([0, *(prompts + responses)])
    trained = np.arange(ends[-1]) >= np.repeat(ends[:-1] + prompts, np.diff(ends))
    return SFTDataset(rng.integers(0, SIZES["vocab_size"], ends[-1]), trained, ends, prompts, pad_id=0)


def with_full_head(batch):
    "The same batch with the head applied at every position."
    size, shape = batch.inputs.size, batch.inputs.shape
    positions = mx.where(batch.loss_mask, batch.positions, size)           # padding goes to an extra position
    targets = mx.zeros(size + 1, mx.int32).at[positions].add(batch.targets)[:-1]
    mask = mx.zeros(size + 1, mx.int32).at[positions].add(1)[:-1] > 0
    return Batch(batch.inputs, targets.reshape(shape), mask.reshape(shape))


def main():
    rows = make_rows()
    order = rng_for(0, 0, "order").permutation(ROWS).reshape(-1, BATCH)
    steps = len(order)
    grouped = [epoch_batches(rows.lengths, BATCH, 0, epoch) for epoch in range(ROUNDS + 1)]
    def shuffled_batch(step): return with_full_head(rows.batch(order[step % steps]))
    def grouped_batch(step): return rows.batch(grouped[step // steps][step % steps])
    variants = {"shuffled, full head": (next_token_loss, shuffled_batch),
                "grouped, full head": (next_token_loss, lambda step: with_full_head(grouped_batch(step))),
                "grouped, head where trained": (response_loss, grouped_batch)}
    trainers = {name: Trainer(Llama(LlamaArgs(**SIZES)), loss, batches_at, (ROUNDS + 1) * steps)
                for name, (loss, batches_at) in variants.items()}
    seconds = {name: [] for name in variants}
    for turn in range(ROUNDS + 1):
        for name in (*variants,) if turn % 2 else (*variants,)[::-1]:
            start = time.perf_counter()
            for _ in range(steps): trainers[name].step()
            if turn: seconds[name].append(time.perf_counter() - start)       # the first epoch compiles
    fastest = {name: min(times) for name, times in seconds.items()}
    ours = fastest["grouped, head where trained"]
    for name, time_taken in fastest.items():
        print(f"{name:32} {time_taken:6.2f} s per epoch, {time_taken / ours:.2f}×")


if __name__ == "__main__": main()
