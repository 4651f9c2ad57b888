"""What a fast BLAS does for a training step on a Linux CPU, and how the stock trainer of mlx-lm compares.

    python benchmarks/blas_step.py                 the trainers take turns in fresh processes; medians and
    ratios
    python benchmarks/blas_step.py --rounds 5      more turns

The rows with mlx-lm need `pip install mlx-lm` (`make interop` installs it); without it they are left out.
"""
import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

SIZES = {"vocab_size": 4096, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6,
         "num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 64, "rms_norm_eps": 1e-5,
         "rope_theta": 10_000.0, "tie_word_embeddings": True}
BATCH, CONTEXT = 2, 256
WARM_UP, TIMED = 2, 2  # steps in one process; the first ones compile and fill memory pools
CASES = {  # name: (trainer, is MLX's own BLAS used?)
    "mlx-pretrain": ("ours", False),
    "mlx-pretrain, stock BLAS": ("ours", True),
    "mlx-lm, fast BLAS": ("mlx_lm", False),
    "mlx-lm, stock BLAS": ("mlx_lm", True),
}


def tokens():
    "The same batch for everyone, one token longer than the context, (BATCH, CONTEXT + 1)."
    import numpy as np

    return np.random.default_rng(0).integers(0, SIZES["vocab_size"], (BATCH, CONTEXT + 1), dtype=np.int32)


def ours():
    "Seconds of each step of our trainer."
    import mlx.core as mx

    from mlx_pretrain.data import Batch
    from mlx_pretrain.model import Llama, LlamaArgs
    from mlx_pretrain.ops import head_loss
    from mlx_pretrain.trainer import Trainer

    ids, seconds = mx.array(tokens()), []
    batch = Batch(ids[:, :-1], ids[:, 1:], mx.ones((BATCH, CONTEXT), dtype=mx.bool_))

    def loss(model, batch):
        return head_loss(model.hidden(batch.inputs), model.head_weight, batch.targets, batch.loss_mask)

    trainer = Trainer(Llama(LlamaArgs(**SIZES)), loss, lambda step: batch, WARM_UP + TIMED)
    for _ in range(WARM_UP + TIMED):
        start = time.perf_counter()
        trainer.step()
        seconds.append(time.perf_counter() - start)
    return seconds


def mlx_lm():
    "Seconds of each step of mlx-lm's trainer, as its own report has them."
    import mlx.core as mx
    import mlx.optimizers as optim
    from mlx_lm.models.llama import Model, ModelArgs
    from mlx_lm.tuner.trainer import TrainingArgs, TrainingCallback, train

    ids, seconds = mx.array(tokens()), []
    lengths = mx.array([[0, CONTEXT]] * BATCH)

    class Clock(TrainingCallback):
        def on_train_loss_report(self, info): seconds.append(1 / info["iterations_per_second"])

    def batches(**kwargs):
        while True: yield ids, lengths

    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArgs(batch_size=BATCH, iters=WARM_UP + TIMED, steps_per_report=1,
                            adapter_file=f"{folder}/adapters.safetensors")
        model = Model(ModelArgs(model_type="llama", **SIZES))
        train(model, optim.AdamW(1e-3), [None] * BATCH, args=args, iterate_batches=batches,
              training_callback=Clock())
    return seconds


def measure(trainer, stock):
    "Seconds of the timed steps in a fresh process."
    env = os.environ | {"MLX_PRETRAIN_BLAS": "off" if stock else ""}
    done = subprocess.run([sys.executable, __file__, "--one", trainer], env=env, capture_output=True,
                          text=True, check=False)
    if done.returncode: sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])[WARM_UP:]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="how often the trainers take turns")
    parser.add_argument("--one", choices=["ours", "mlx_lm"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        import mlx_pretrain  # noqa: F401 (loads the BLAS, before MLX)

        return print(json.dumps({"ours": ours, "mlx_lm": mlx_lm}[args.one]()))
    cases = {name: case for name, case in CASES.items() if case[0] == "ours"
             or importlib.util.find_spec("mlx_lm")}
    seconds = {name: [] for name in cases}
    for turn in range(args.rounds):
        for name, case in cases.items():
            seconds[name] += measure(*case)
            print(f"round {turn + 1} of {args.rounds}: {name} {seconds[name][-1]:.2f} s", file=sys.stderr,
                  flush=True)
    print(
        f"{SIZES['num_hidden_layers']} layers of width {SIZES['hidden_size']}, "
        f"batch {BATCH} x {CONTEXT} tokens, "
        f"median of {args.rounds * TIMED} steps"
    )
    best = statistics.median(seconds["mlx-pretrain"])
    for name, times in seconds.items():
        middle = statistics.median(times)
        print(
            f"{name:26}{middle:8.2f} s per step {BATCH * CONTEXT / middle:8.0f} tokens/s "
            f"{middle / best:7.1f} x the time"
        )
    if len(cases) < len(CASES): print("mlx-lm is not installed, so its rows are missing.")


if __name__ == "__main__": main()
