"Toy tasks for reinforcement learning: a vocabulary of letters, an untrained Llama, and planted mistakes."
import inspect
import json
import tempfile
from pathlib import Path

import mlx_pretrain  # noqa: F401, I001 (before MLX)

import numpy as np
from mlx.utils import tree_map

from mlx_pretrain.model import Llama, LlamaArgs
from mlx_pretrain.ppo import PPOConfig, PPOTrainer
from mlx_pretrain.pretrained import Pretrained
from mlx_pretrain.tokenizer import Tokenizer


class Letters(Tokenizer):
    "One token per letter, after pad, bos and eos."
    pad_id, bos_id, eos_id, _files = 0, 1, 2, {}

    def __init__(self, letters): self.letters, self.vocab_size = letters, 3 + len(letters)
    def _encode_batch(self, texts):
        return [np.array([3 + self.letters.index(c) for c in text], np.int64) for text in texts]
    def _decode(self, ids): return "".join(map(self._name, ids))
    def _name(self, i): return self.letters[i - 3] if i > 2 else ("<pad>", "<bos>", "<eos>")[i]
    def _control(self): return {}


def tiny(letters="abcdefgh", seed=0, layers=1, kv_heads=2, loud=1):
    "An untrained policy. With `loud` above 1 its logits are larger, and depend more on the context."
    tok = Letters(letters)
    args = LlamaArgs(vocab_size=tok.vocab_size, hidden_size=32, intermediate_size=64,
                     num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=kv_heads,
                     head_dim=16, tie_word_embeddings=False)
    model = Llama(args, seed)
    model.update(tree_map(lambda w: loud * w if w.ndim > 1 else w, model.parameters()))
    return Pretrained(model, tok, Path("tiny"))


def task(reward, letters="abcdefgh", prompts=("",), *, seed=0, steps=40, lr=3e-3, batch=64, end=0.0,
         pretrained=None, system=None, **data):
    "A trainer on letters; `data` goes into the section `data`."
    file = Path(tempfile.mkdtemp(), "prompts.jsonl")
    file.write_text("".join(json.dumps(row if isinstance(row, dict) else {"prompt": row}) + "\n"
                            for row in prompts))
    cfg = {"data": {"input_file": str(file), "ppo_mini_batch_size": batch // 2, **data},
           "system": {"seed": seed, **(system or {})},
           "training": {"hyperparameters": {"batch_size": batch, "learning_rate": lr, "iters": steps},
                        "scheduler": {"type": "linear", "min_lr_ratio": end}}}
    return PPOTrainer(PPOConfig.model_validate_json(json.dumps(cfg)), pretrained or tiny(letters, seed),
                      reward=reward)


def mean_reward(trainer, n=256):
    "Mean reward of n new samples of the policy."
    indices = np.arange(n) % len(trainer.data)
    return float(trainer.sample(trainer.data, indices, {"temperature": 1.0}, -7).scores.mean())


def planted(function, right, wrong):
    "The function with a mistake in its source."
    source = inspect.getsource(function)
    assert source.count(right) == 1, (source.count(right), right)
    names = dict(function.__globals__)
    exec(source.replace(right, wrong), names)
    return names[function.__name__]


