"""Train a byte model with PPO, resuming if there is a checkpoint.

`ppo.py FOLDER [sample | update NUMBER]`: killed in that sample or update.
"""
import json
import os
import signal
import sys
from pathlib import Path

import mlx_pretrain  # noqa: F401 (before MLX)
from mlx_pretrain.core import RewardModel
from mlx_pretrain.model import Llama, LlamaArgs
from mlx_pretrain.ppo import PPOConfig, PPOTrainer, ppo
from mlx_pretrain.pretrained import export
from mlx_pretrain.tokenizer import ByteTokenizer

folder, place, number = Path(sys.argv[1]), *(sys.argv[2:] or ("", "0"))
(folder / "rows.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n"
                                           for p in ("a", "bcd", "ef", "g", "hello")))
if not (folder / "base").exists():
    args = LlamaArgs(vocab_size=259, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                     num_attention_heads=2, num_key_value_heads=2, head_dim=8)
    export(Llama(args), ByteTokenizer(), folder / "base")
calls = {"sample": 0, "update": 0}


def count(what):
    calls[what] += 1
    if what == place and calls[what] == int(number): os.kill(os.getpid(), signal.SIGKILL)


class Reward(RewardModel):
    def compute_reward(self, prompts, responses):
        count("sample")
        with open(folder / "scored.txt", "a") as f: f.write(json.dumps([prompts, responses]) + "\n")
        return [sum(map(ord, r)) % 97 / 97 for r in responses]


update = PPOTrainer.apply_update
def counted(self, *args):
    count("update")
    return update(self, *args)


PPOTrainer.apply_update = counted
ppo(
    PPOConfig.model_validate_json(
        json.dumps(
            {
                "name": "run",
                "pretrained_model": str(folder / "base"),
                "resume": {"checkpoint": "latest"},
                "data": {
                    "input_file": str(folder / "rows.jsonl"),
                    "validation_file": str(folder / "rows.jsonl"),
                    "response_length": 6,
                    "ppo_mini_batch_size": 2,
                },
                "training": {"hyperparameters": {"batch_size": 4, "iters": 6, "learning_rate": 1e-3}},
                "logging": {
                    "steps": {"checkpoint_interval": 2, "validation_interval": 3, "logging_interval": 1}
                },
            }
        )
    ),
    folder / "runs",
    reward=Reward(),
)
