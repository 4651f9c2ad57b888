"Reward models on pairs from a known rule, and PPO on them, on five seeds: the rule's own value rises."
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_reward import count_a, pairs, trainer_on, with_lora  # noqa: E402
from toys import task, tiny  # noqa: E402

NIGHTLY = [pytest.param(seed, marks=pytest.mark.nightly) for seed in (2, 3, 4)]
SEEDS = pytest.mark.parametrize("seed", [0, 1, *NIGHTLY])


def gold_reward(trainer):
    "The mean reward of the policy's samples by the rule itself."
    samples = trainer.sample(trainer.data, np.zeros(256, int), {"temperature": 1.0}, -7)
    return np.mean([count_a("", response) for response in samples.response_texts])


def learned(folder, seed, swap=False):
    "A reward model, and its accuracy on held-out pairs in their right order."
    trainer = trainer_on(folder, pairs(200, seed, swap), pairs(200, 100 + seed), tiny(seed=seed), steps=30,
                         batch=32, lr=5e-3)
    accuracy = trainer.run()["val_accuracy"]
    return trainer.normalized(), accuracy


@SEEDS
def test_known_rule_is_learned_and_raised(seed, tmp_path):
    "Accuracy of at least 90%, and PPO writes more `a`."
    reward, accuracy = learned(tmp_path, seed)
    trainer = task(reward, seed=seed, steps=16, batch=32, lr=1e-2, response_length=6, kl_coef=0.05)
    before = gold_reward(trainer)
    trainer.run()
    assert accuracy >= 0.9 and gold_reward(trainer) > before + 0.08


@pytest.mark.parametrize("seed", range(3))
def test_swapped_pairs_are_learned_swapped(seed, tmp_path):
    "Negative control: accuracy of at most 10%, and PPO does not raise the rule."
    reward, accuracy = learned(tmp_path, seed, swap=True)
    trainer = task(reward, seed=seed, steps=16, batch=32, lr=1e-2, response_length=6, kl_coef=0.05)
    before = gold_reward(trainer)
    trainer.run()
    assert accuracy <= 0.1 and gold_reward(trainer) < before + 0.02


@pytest.mark.parametrize("seed", range(3))
def test_lora_policy_raises_a_rule(seed):
    "With rank 2; with a learning rate of almost 0 it does not change."
    def lora_trainer(lr):
        return with_lora(tiny(seed=seed, loud=8), steps=20, batch=32, lr=lr, kl_coef=0.02, ppo_epochs=2,
                         seed=seed)
    trainer, idle = lora_trainer(2e-2), lora_trainer(1e-9)
    before = gold_reward(trainer)
    trainer.run()
    for _ in range(3): idle.step()
    assert gold_reward(trainer) > before + 0.2 and abs(gold_reward(idle) - before) < 0.01
