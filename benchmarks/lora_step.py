"""LoRA on SmolLM2-135M-Instruct, here and with mlx-lm's own trainer, in fresh processes that alternate.

    python benchmarks/lora_step.py              medians, ratios, held-out losses, curves in runs/lora_step.png
    python benchmarks/lora_step.py --rounds 4   more rounds with other rows; an even number, for a fair order
    python benchmarks/lora_step.py --steps 100  longer rounds

Both train the same rows, with the same adapters, optimizer and BLAS; a round is one epoch. It needs
`pip install mlx-lm chatterbot-corpus`, and the files written by tools/smollm2.py and tools/exchanges.py.

The training losses are means over different tokens: ours counts the response and `<|im_end|>`, mlx-lm in each
row also the line break that the template writes next, and one token of padding after it. The held-out loss is
computed by our function for both, from the adapters that each trainer has saved. Ours groups rows of similar
length. mlx-lm intends to, but treats all chat rows as equally long, so that they stay in the order of the
file. Both trace a new graph for each new shape of a batch, which is included in the total. On a CPU, MLX also
compiles new kernels, half a minute in all, and caches them in the folder for temporary files; a few steps of
each trainer beforehand do that. Leave the machine idle meanwhile: the threads of a BLAS wait for each other.
"""
import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from subprocess import run

import mlx_pretrain  # noqa: F401, I001 (loads the BLAS, before MLX)

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np

DATA = Path(__file__).parents[1] / "data"
MODEL = DATA / "SmolLM2-135M-Instruct"
TRAIN = DATA / "exchanges" / "train.jsonl"
HELD_OUT = DATA / "exchanges" / "val.jsonl"
RANK, SCALE, BATCH, RATE = 8, 2.0, 4, 5e-4  # mlx-lm's rank and batch size
WARM_UP = 3  # steps that are in the total only
# metric → digits
UNITS = {"s per step": 3, "s in total": 1, "rows/s": 2, "tokens/s": 1, "GB in MLX": 2, "GB of process": 2,
         "held-out loss": 4}


def optimizer(): return optim.AdamW(RATE, [0.9, 0.95], 1e-8, 0.01, bias_correction=True)


def our_trainer(base, rows, seed=0, **kwargs):
    "Our trainer for one epoch, without clipping, as mlx-lm does not clip."
    from mlx_pretrain.sft import SFTConfig, SFTTrainer

    cfg = SFTConfig.model_validate(
        {
            "data": {"input_file": str(rows), "validation_file": str(HELD_OUT)},
            "system": {"precision": "float32", "seed": seed},
            "training": {
                "lora": {"rank": RANK, "alpha": SCALE * RANK},
                "hyperparameters": {"batch_size": BATCH, "learning_rate": RATE, "gradient_clip": 1e9},
            },
        }
    )
    return SFTTrainer(cfg, base, optimizer=optimizer(), schedule=lambda step: RATE, **kwargs)


def ours(folder, seed, record):
    from mlx_pretrain.lora import save_adapters
    from mlx_pretrain.pretrained import load

    trainer = our_trainer(load(MODEL), folder / "rows.jsonl", seed,
                          callbacks=[lambda trainer, step: record(step["loss"], step["tokens"])])
    trainer.held_out = None
    record.start()
    trainer.run()
    save_adapters(trainer.model, folder)


def mlx_lm(folder, seed, record):
    "As `mlx_lm.lora --mask-prompt` does it."
    from mlx_lm.tuner.datasets import CacheDataset, ChatDataset
    from mlx_lm.tuner.trainer import TrainingArgs, TrainingCallback, train
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load, save_config

    class Recorder(TrainingCallback):
        def on_train_loss_report(self, info): record(info["train_loss"], info["trained_tokens"])

    np.random.seed(seed)
    mx.random.seed(seed)
    model, tokenizer = load(str(MODEL))
    lora = {"rank": RANK, "scale": SCALE, "dropout": 0.0}
    about = {"fine_tune_type": "lora", "num_layers": len(model.layers), "lora_parameters": lora}
    model.freeze()
    linear_to_lora_layers(model, len(model.layers), lora)
    save_config(about, folder / "adapter_config.json")
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    chats = [(("user", row["instruction"]), ("assistant", row["response"])) for row in rows]
    chats = [{"messages": [{"role": role, "content": text} for role, text in row]} for row in chats]
    args = TrainingArgs(BATCH, len(rows) // BATCH, steps_per_report=1,
                        adapter_file=folder / "adapters.safetensors")
    record.start()
    train(model, optimizer(), CacheDataset(ChatDataset(chats, tokenizer, mask_prompt=True)), args=args,
          training_callback=Recorder())


class Record:
    "For each step the seconds (including what happens between steps), the loss, and the tokens so far."
    def __init__(self): self.seconds, self.losses, self.tokens = [], [], []

    def start(self):
        mx.reset_peak_memory()
        self.last = time.perf_counter()

    def __call__(self, loss, tokens):
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.losses.append(loss)
        self.tokens.append(tokens)
        self.last = now

    def summary(self):
        later, status = self.seconds[WARM_UP:], Path("/proc/self/status")
        whole = (
            int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024 / 1e9
            if status.exists()
            else float("nan")
        )
        numbers = [median(later), sum(self.seconds), BATCH * len(later) / sum(later),
                   (self.tokens[-1] - self.tokens[WARM_UP - 1]) / sum(later), mx.get_peak_memory() / 1e9,
                   whole]
        return {"losses": self.losses, **dict(zip(UNITS, numbers))}


def take_turn(who, lines, seed, measure):
    "Run one trainer in a fresh process on these rows; then measure the held-out loss of its adapters."
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        done = run([sys.executable, __file__, "--turn", who, folder, str(seed)], capture_output=True,
                   text=True, check=False)
        if done.returncode: sys.exit(done.stderr)
        return json.loads(done.stdout.splitlines()[-1]) | {"held-out loss": measure(folder)}


def draw(made, before):
    "Plot training losses, raw (thin) and smoothed (thick), and held-out losses before and after."
    from matplotlib.figure import Figure

    from mlx_pretrain.plot import smooth, save_figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="steps", ylabel="loss (nats per token)",
                              title="SmolLM2-135M-Instruct with adapters")
    for color, (who, turns) in zip(("C0", "C1"), made.items()):
        losses = np.array([turn["losses"] for turn in turns]).T           # (steps, turns)
        after, at = median(turn["held-out loss"] for turn in turns), np.arange(1, len(losses) + 1)
        axes.plot(at, losses, color=color, alpha=0.25, linewidth=1)
        axes.plot(at, smooth(losses.mean(axis=1), 9), color=color, label=f"{who}: training, as it counts")
        axes.plot([0, at[-1]], [before, after], "o--", color=color, markersize=4,
                  label=f"{who}: held out, {before:.3f} → {after:.3f}")
    axes.grid(alpha=0.3)
    axes.legend()
    return save_figure(figure, DATA.parent / "runs" / "lora_step.png")


def compare(rounds, steps):
    "Run both trainers alternately; print each result, then medians and ratios."
    from mlx_pretrain.lora import load_adapters
    from mlx_pretrain.pretrained import load
    from mlx_pretrain.step import evaluate_loss

    lines = TRAIN.read_text(encoding="utf-8").splitlines()
    base = load(MODEL)
    made = {"ours": [], "mlx-lm": []}
    trainer = our_trainer(base, TRAIN)                                    # for its loss and its held-out rows

    def measure(folder):
        total, count = evaluate_loss(load_adapters(base.model, folder), trainer.loss,
                                     trainer.held_out_batches())
        return total / count

    before = trainer.evaluate()["val_loss"]  # with adapters of zero
    for who in made: take_turn(who, lines[:BATCH * (WARM_UP + 1)], 0, measure)
    for n in range(rounds):
        drawn = [lines[i] for i in np.random.default_rng(n).choice(len(lines), steps * BATCH, replace=False)]
        for who in (*made,)[::-1 if n % 2 else 1]:
            made[who].append(turn := take_turn(who, drawn, n, measure))
            print(f"round {n + 1}, {who}:",
                  ", ".join(f"{turn[key]:.{digits}f} {key}" for key, digits in UNITS.items()), flush=True)
    print(
        f"{steps} steps of {BATCH} rows, {mx.default_device()}, medians of {rounds} rounds; "
        f"held-out loss before: {before:.4f}"
    )
    for key, digits in UNITS.items():
        a, b = ([turn[key] for turn in turns] for turns in made.values())
        print(
            f"{key:14}  ours {median(a):8.{digits}f}   mlx-lm {median(b):8.{digits}f}   "
            f"ratio {median(y / x for x, y in zip(a, b)):.3f}"
        )
    print(draw(made, before))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="rounds per trainer")
    parser.add_argument("--steps", type=int, default=40, help="steps per round, more than 3")
    parser.add_argument("--turn", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.turn:
        (who, folder, seed), record = args.turn, Record()
        # MKL takes Intel's threads now; after torch it takes GNU's
        mx.eval(mx.ones((64, 64)) @ mx.ones((64, 64)))
        {"ours": ours, "mlx-lm": mlx_lm}[who](Path(folder), int(seed), record)
        return print(json.dumps(record.summary()))
    if missing := [str(path) for path in (MODEL, TRAIN, HELD_OUT) if not path.exists()]:
        sys.exit(f"{missing[0]} is missing: run tools/smollm2.py and tools/exchanges.py")
    compare(args.rounds, args.steps)


if __name__ == "__main__": main()
