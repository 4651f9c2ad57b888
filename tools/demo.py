"""`make demo`: pretrain a small Llama, fine-tune it, train a reward model, run PPO; each step a command."""
import gzip
import json
import lzma
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONFIG, RUN = "configs/demo.yaml", "runs/demo"
SFT_CONFIG, SFT_RUN = "configs/demo-sft.yaml", "runs/demo-sft"
REWARD_CONFIG, REWARD_RUN = "configs/demo-reward.yaml", "runs/demo-reward"
RL_CONFIG, RL_RUN = "configs/demo-rl.yaml", "runs/demo-rl"
PROMPTS = ("My fellow Americans,", "The state of the Union is", "We must")
SAMPLING = "--max_new_tokens 80 --temperature 0.6 --top_p 0.95".split()


def command(*words):
    "Show a command and run it; stop where it stops."
    print(f"\n\033[1m$ {shlex.join(words)}\033[0m" if sys.stdout.isatty() else f"\n$ {shlex.join(words)}",
          flush=True)
    program = {"python": [sys.executable], "mlx-pretrain": [sys.executable, "-m", "mlx_pretrain"]}[words[0]]
    child = subprocess.Popen([*program, *words[1:]])
    try: code = child.wait()
    except KeyboardInterrupt:  # it got the Ctrl-C too, and may need a moment to save
        code = child.wait() or 130
    if code: sys.exit(code)


def summary(seconds):
    "The result, compared with general-purpose compressors."
    lines = [json.loads(line) for line in Path(RUN, "metrics.jsonl").read_text().splitlines()]
    bits = next(line["val_bits_per_byte"] for line in reversed(lines) if "val_bits_per_byte" in line)
    held_out = Path("data/sotu/val.jsonl")
    text = "".join(json.loads(line)["text"]
                   for line in held_out.read_text(encoding="utf-8").splitlines()).encode()
    packed = {"gzip -9": gzip.compress(text, 9), "xz -9": lzma.compress(text, preset=9)}
    others = ", ".join(f"{name} {8 * len(data) / len(text):.3f}" for name, data in packed.items())
    duration = f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    print(f"""
Done in {duration}. Bits per byte on six held-out addresses: {bits:.3f}   ({others})

Where things are
  {RUN}/report.html      all steps on one page, to look at and to show
  {RUN}/model/           the model; mlx-lm and transformers load it as it is
  {RUN}/metrics.jsonl    all metrics; {RUN}/logs/log.txt has them in readable form
  {SFT_RUN}/ {REWARD_RUN}/ {RL_RUN}/     the same for the later stages
  configs/demo*.yaml         the settings of the runs; change them and train again

What next
  .venv/bin/mlx-pretrain generate --run {RUN} --prompt "The people"
  .venv/bin/mlx-pretrain chat --run {RL_RUN} --temperature 0.5
  .venv/bin/python train.py --config {CONFIG} --name wider --model.dimensions.hidden_size 192
  make lab               how it works, notebook by notebook, from 00_model on""")


def main():
    os.chdir(ROOT)
    start = time.perf_counter()
    command("python", "tools/speeches.py")
    command("mlx-pretrain", "tokenizer", "--config", CONFIG)
    command("python", "train.py", "--config", CONFIG)
    for prompt in PROMPTS: command("mlx-pretrain", "generate", "--run", RUN, "--prompt", prompt, *SAMPLING)
    command("mlx-pretrain", "plot", RUN)
    command("python", "tools/exchanges.py")
    command("python", "sft.py", "--config", SFT_CONFIG, "--pretrained_model", RUN)
    command("mlx-pretrain", "plot", SFT_RUN)
    command("python", "tools/compare.py", RUN, SFT_RUN)
    command("python", "tools/preferences.py", SFT_RUN)
    command("mlx-pretrain", "reward", "--config", REWARD_CONFIG, "--pretrained_model", SFT_RUN)
    command("mlx-pretrain", "plot", REWARD_RUN)
    command("python", "rl.py", "--config", RL_CONFIG, "--pretrained_model", SFT_RUN, "--reward_model",
            REWARD_RUN)
    command("mlx-pretrain", "plot", RL_RUN)
    command("python", "tools/report.py", RUN, SFT_RUN, REWARD_RUN, RL_RUN)
    summary(time.perf_counter() - start)


if __name__ == "__main__": main()
