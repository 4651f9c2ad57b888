"""PPO here and in TRL 1.12.0, the last one that had it: one policy, one reward, the same hyperparameters;
reward against updates and time.

    pip install trl==1.12.0 accelerate==1.15.0 datasets==5.2.0 transformers==5.23.0 torch==2.13.0
    python benchmarks/trl_ppo.py [trl_ppo.png] [--seeds 3] [--threads 1]     table, figure; 4 to 5 min

The task: 12 characters, letters if the prompt is made of letters, digits if of digits. A Llama of a million
parameters is first taught, on random text, to say any character equally often, so the best policy is known.
Runs take turns, each in a process of its own.

Seen with three seeds, one thread a run, on two cores that others used too:

           s/step  first  reward     KL  reward - price x KL
    ours     1.15   1.21   0.933   18.4                0.749
    TRL      1.14   0.97   0.937   18.6                0.751
    best                   0.999   17.9                0.820

Both end alike; on the way ours was a few steps ahead, on three seeds. Of TRL's step, 0.38 s are two calls of
gc.collect(). Its 16 updates are faster, some 43 ms each against 62: gradients 35 against 40, the optimizer 3
to 5 against 15 (Adam 6, clipping 4, the check that all is finite 4). So TRL is ahead where updates weigh
more: with 1.8 million parameters and 64 responses of 16 tokens it took 2.8 s a step, ours 3.8 to 4.8. Two
threads gave it 0.93 s (ours 1.03), on one seed, while little else ran; beside other work single steps of TRL
took up to 58 s then, but none did with one thread.

What could not be made equal:

- TRL adds the score one place after the token that ends a response, if there is room, and trains the critic
  there; we add it on that token.
- TRL keeps the log-probabilities of sampling; we compute them anew by the pass that is differentiated, so
  that the first ratio is 1.
- To TRL a padding token that the policy says ends the response, and gets no gradient. A policy with random
  weights came to say it more and more (reward 0.23 after 30 steps, ours 0.70, one seed, 16 characters), which
  is why the policy is taught first.
- TRL does not clip gradients, whatever max_grad_norm says, so ours are not clipped here; by default we clip
  at 1.
- TRL's critic is a trunk of its own, like ours; its head starts random, but here with zeros, as ours does.
- TRL whitens by the variance over n - 1, we by that over n; its batches are as wide as their longest row,
  ours rounded up to fours.
- Prompts come in another order, and samples from another generator.
"""
import argparse
import json
import math
import os
import random
import string
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

SIZES = {"vocab_size": 259, "hidden_size": 160, "intermediate_size": 448, "num_hidden_layers": 3,
         "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 80}
STEPS = 30
BATCH = 32
EPOCHS = 4
SIZE = 8
RATE = 1e-3
BETAS = (0.9, 0.95)
EPS = 1e-5
CLIP = 0.2
LENGTH = 12
PRICE = 0.01
SAME = {"response_length": LENGTH, "kl_coef": PRICE, "vf_coef": 0.1, "cliprange_value": 0.2, "gamma": 1.0,
        "lam": 0.95, "temperature": 1.0}
KINDS, END = (string.ascii_letters, string.digits), 1 / 12
ALL = "".join(KINDS) + string.punctuation


def reward(prompt, response):
    "Fraction of characters that are letters if the prompt is made of letters, or digits if of digits."
    return sum(c in KINDS[prompt[0].isdigit()] for c in response) / LENGTH


def prompts(n, draw):
    return ["".join(draw.choices(KINDS[i % 2], k=draw.randint(1, 6))) + ":" for i in range(n)]


def best():
    "Reward and KL of the policy that is worth most, if the first one is what it was taught."
    found = []
    for kind in KINDS:
        share, reward, kl, value = (1 - END) * len(kind) / len(ALL), 0.0, 0.0, 0.0
        for _ in range(LENGTH):                                           # from the last place to the first
            was = share, 1 - END - share, END                             # right, wrong, end
            odds = [p * math.exp(x / PRICE) for p, x in zip(was, (1 / LENGTH + value, value, 0))]
            now = [x / sum(odds) for x in odds]
            reward = now[0] / LENGTH + (1 - now[2]) * reward
            kl = sum(p * math.log(p / q) for p, q in zip(now, was)) + (1 - now[2]) * kl
            value = PRICE * math.log(sum(odds))
        found.append((reward, kl))
    return np.mean(found, axis=0)


def teach(directory, steps=150, rows=32):
    "A Llama that answers any prompt with any characters, and mostly ends before the last place."
    from mlx_pretrain.data import Batch
    from mlx_pretrain.model import Llama, LlamaArgs
    from mlx_pretrain.pretrain import next_token_loss
    from mlx_pretrain.pretrained import export
    from mlx_pretrain.tokenizer import ByteTokenizer
    from mlx_pretrain.trainer import Trainer

    import mlx.core as mx

    tok, draw = ByteTokenizer(), random.Random(0)

    def batch(step):
        ids = np.full((rows, LENGTH + 8), tok.pad_id, np.int32)
        for row, prompt in zip(ids, prompts(rows, draw)):
            n = next((n for n in range(LENGTH) if draw.random() < END), LENGTH)
            text = [tok.bos_id, *(prompt + "".join(draw.choices(ALL, k=n))).encode(),
                    *([tok.eos_id] if n < LENGTH else [])]
            row[:len(text)] = text
        return Batch(*map(mx.array, (ids[:, :-1], ids[:, 1:], ids[:, 1:] != tok.pad_id)))

    model = Llama(LlamaArgs(**SIZES))
    print(f"the first policy's loss: {Trainer(model, next_token_loss, batch, steps).run()['loss']:.2f}")
    export(model, tok, directory)


def ours(model, seed, note):
    "The trainer of this project."
    from mlx_pretrain.ppo import PPOConfig, PPOTrainer
    from mlx_pretrain.pretrained import load

    file = Path(model, "..", "prompts.jsonl")
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n"
                            for prompt in prompts(512, random.Random(1))))
    cfg = {"data": {"input_file": str(file), "ppo_epochs": EPOCHS, "ppo_mini_batch_size": SIZE,
                    "clip_range": CLIP, **SAME, "guards": "warn"},
           "training": {"hyperparameters": {"batch_size": BATCH, "learning_rate": RATE, "iters": STEPS,
                                            "gradient_clip": 1e9},
                        "optimization": {"betas": BETAS, "eps": EPS}},
           "system": {"seed": seed, "device": "cpu"}}
    trainer = PPOTrainer(PPOConfig.model_validate_json(json.dumps(cfg)), load(model), reward,
                         schedule=lambda n: RATE * (1 - n / STEPS),
                         callbacks=[lambda _, metrics: note(metrics["reward"], metrics["kl"])])
    note()
    trainer.run()


def trl(model, seed, note):
    "TRL's trainer, with a network around the reward."
    import torch
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback, set_seed)
    from transformers.utils import ModelOutput
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")

    class Rule(torch.nn.Module):  # its hidden state is the reward of the row
        base_model_prefix, itself, score = "itself", property(lambda self: self), torch.nn.Identity()

        def forward(self, input_ids, attention_mask, **_):
            scores = []
            for ids, kept in zip(input_ids.tolist(), attention_mask.tolist()):
                start = kept.index(1)
                text = tokenizer.decode(ids[start:[*kept, 0].index(0, start)], skip_special_tokens=True)
                asked, _, said = text.partition(":")
                scores.append(reward(asked + ":", said))
            return ModelOutput(hidden_states=(torch.tensor(scores)[:, None, None].expand(*input_ids.shape, 1),
                                              ))

    class Watch(TrainerCallback):
        def on_train_begin(self, *_, **__): note()
        def on_log(self, *_, logs, **__): note(logs["objective/scores"], logs["objective/kl"])

    set_seed(seed)
    policy, reference = (AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32) for _ in range(2))
    critic = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32)
    torch.nn.init.zeros_(critic.score.weight)
    cfg = PPOConfig(str(Path(model, "..", "trl")), seed=seed, use_cpu=True, bf16=False,
                    gradient_checkpointing=False, report_to="none", logging_steps=1, save_strategy="no",
                    num_sample_generations=0, total_episodes=STEPS * BATCH, stop_token="eos",
                    per_device_train_batch_size=BATCH, num_mini_batches=BATCH // SIZE, num_ppo_epochs=EPOCHS,
                    cliprange=CLIP, learning_rate=RATE, adam_beta1=BETAS[0], adam_beta2=BETAS[1],
                    adam_epsilon=EPS, **SAME)
    rows = Dataset.from_list([{"input_ids": tokenizer(prompt)["input_ids"]}
                              for prompt in prompts(512, random.Random(1))])
    PPOTrainer(cfg, tokenizer, policy, reference, Rule(), rows, critic, eval_dataset=rows,
               callbacks=[Watch()]).train()


WAYS = {"ours": ours, "TRL": trl}


def run(name, seed, model, out):
    "Train in this process; seconds, reward and KL of each step go into a file."
    seen = []
    WAYS[name](model, seed, lambda *numbers: seen.append((time.perf_counter(), *numbers)))
    Path(out).write_text(json.dumps([(at - seen[0][0], *numbers) for at, *numbers in seen[1:STEPS + 1]]))


def race(model, seeds, threads):
    "Each way in a process of its own, one after the other, in alternating order: (seeds, STEPS, 3) each."
    out, runs = Path(model, "..", "out.json"), {name: [] for name in WAYS}
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    for seed in range(seeds):
        for name in list(WAYS)[::-1 if seed % 2 else 1]:
            done = subprocess.run([sys.executable, __file__, "--run", name, str(seed), model, out], env=env,
                                  capture_output=True, text=True)
            if done.returncode: sys.exit(done.stderr)
            runs[name].append(json.loads(out.read_text()))
            print(f"seed {seed}: {name} took {runs[name][-1][-1][0]:.0f} s", flush=True)
    return {name: np.array(found) for name, found in runs.items()}


def tell(runs):
    "The table: medians of the time, means of the last five steps."
    print(f"{'':5} {'s/step':>7} {'first':>6} {'reward':>7} {'KL':>6} {'reward - price x KL':>20}")
    steps = {name: np.median(np.diff(found[..., 0])) for name, found in runs.items()}
    for name, found in runs.items():
        gain, kl = found[:, -5:, 1:].mean(axis=(0, 1))
        print(
            f"{name:5} {steps[name]:7.2f} {np.median(found[:, 0, 0]):6.2f} {gain:7.3f} {kl:6.1f} "
            f"{gain - PRICE * kl:20.3f}"
        )
    gain, kl = best()
    print(f"best  {'':14} {gain:7.3f} {kl:6.1f} {gain - PRICE * kl:20.3f}")
    print(f"a step of ours takes {steps['ours'] / steps['TRL']:.2f} times as long as TRL's")


def draw(runs, png):
    "Reward against updates, and against seconds."
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for (name, found), color in zip(runs.items(), ("tab:blue", "tab:orange")):
        updates = np.broadcast_to(EPOCHS * BATCH // SIZE * np.arange(STEPS), found.shape[:2])
        for ax, x in zip(axes, (updates, found[..., 0])):
            for row, y in zip(x, found[..., 1]): ax.plot(row, y, color=color, lw=0.7, alpha=0.5)
            ax.plot(x.mean(axis=0), found[..., 1].mean(axis=0), color=color, lw=2.2,
                    label=f"{name}, mean of {len(found)} seeds")
    for ax, label in zip(
        axes, ("updates before the samples", "seconds since the first sample was asked for")
    ):
        ax.axhline(best()[0], color="gray", ls="--", lw=1, label="best policy at this price of KL")
        ax.set(xlabel=label, xlim=0, ylim=(0, 1.03))
    axes[0].set_ylabel("reward of a step's samples")
    axes[0].legend(loc="lower right", frameon=False)
    figure.savefig(png, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("png", nargs="?", default="trl_ppo.png", help="where the figure goes")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--run", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run: return run(args.run[0], int(args.run[1]), *args.run[2:])
    with tempfile.TemporaryDirectory() as folder:
        teach(f"{folder}/model")
        runs = race(f"{folder}/model", args.seeds, args.threads)
    tell(runs)
    draw(runs, args.png)


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false"}
    main()
