"""What the quick exponential and the spelled-out attention of `ops` are worth in a training step on a Linux
CPU.

    python benchmarks/ops_step.py       both forms take turns in one process; medians and their ratio
"""
import statistics
import sys
import time

import mlx_pretrain  # noqa: F401, I001 (loads the BLAS, before MLX)

import mlx.core as mx

from mlx_pretrain import ops
from mlx_pretrain.data import Batch
from mlx_pretrain.model import Llama, LlamaArgs
from mlx_pretrain.pretrain import next_token_loss
from mlx_pretrain.trainer import Trainer

# those of configs/demo.yaml
SIZES = {"vocab_size": 2048, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4,
         "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64}
BATCH, CONTEXT, WARM_UP, ROUNDS = 16, 64, 3, 30


def main():
    if not ops._slow_exp(): sys.exit("the two forms are the same here: this is about MLX on a Linux CPU")
    ids = mx.random.randint(0, SIZES["vocab_size"], (BATCH, CONTEXT + 1), key=mx.random.key(0))
    batch = Batch(ids[:, :-1], ids[:, 1:], mx.ones((BATCH, CONTEXT), dtype=mx.bool_))
    trainers, seconds = {}, {"plain": [], "quick": []}
    for name in seconds:  # a step is compiled when it is first taken, in the form that holds then
        ops._slow_exp = lambda quick=name == "quick": quick
        trainers[name] = Trainer(Llama(LlamaArgs(**SIZES)), next_token_loss, lambda step: batch,
                                 WARM_UP + ROUNDS)
        for _ in range(WARM_UP): trainers[name].step()
    for turn in range(ROUNDS):
        for name in (*seconds,) if turn % 2 else (*seconds,)[::-1]:
            start = time.perf_counter()
            trainers[name].step()
            seconds[name].append(time.perf_counter() - start)
    plain, quick = (statistics.median(times) for times in seconds.values())
    print(
        f"{BATCH} x {CONTEXT} tokens: plain {1000 * plain:.0f} ms, quick {1000 * quick:.0f} ms, "
        f"{plain / quick:.2f} x as fast"
    )


if __name__ == "__main__": main()
