"A reward model on pairs made by a known rule, and PPO against it, on five seeds: the rule is what rises."
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_reward import count_a, pairs, trainer_on, with_lora  # noqa: E402
from toys import task, tiny  # noqa: E402

NIGHTLY = [pytest.param(seed, marks=pytest.mark.nightly) for seed in (2, 3, 4)]
SEEDS = pytest.mark.parametrize("seed", [0, 1, *NIGHTLY])


def known(trainer):
    "What the policy's own samples are worth by the rule itself."
    said = trainer.sample(trainer.data, np.zeros(256, int), {"temperature": 1.0}, -7).response_texts
    return np.mean([count_a("", response) for response in said])


def learned(folder, seed, swap=False):
    "A reward model, and how often it is right about held-out pairs in their right order."
    trainer = trainer_on(folder, pairs(200, seed, swap), pairs(200, 100 + seed), tiny(seed=seed), steps=30,
                         batch=32, lr=5e-3)
    accuracy = trainer.run()["val_accuracy"]
    return trainer.normalised(), accuracy


@SEEDS
def test_a_known_rule_rises(seed, tmp_path):
    "At least 90% of held-out pairs in order, and PPO against what was learned says more `a`."
    reward, accuracy = learned(tmp_path, seed)
    trainer = task(reward, seed=seed, steps=16, batch=32, lr=1e-2, response_length=6, kl_coef=0.05)
    before = known(trainer)
    trainer.run()
    assert accuracy >= 0.9 and known(trainer) > before + 0.08


@pytest.mark.parametrize("seed", range(3))
def test_swapped_pairs_are_learned_as_they_are(seed, tmp_path):
    "Negative control: at most 10% in order, and PPO against that does not raise the rule."
    reward, accuracy = learned(tmp_path, seed, swap=True)
    trainer = task(reward, seed=seed, steps=16, batch=32, lr=1e-2, response_length=6, kl_coef=0.05)
    before = known(trainer)
    trainer.run()
    assert accuracy <= 0.1 and known(trainer) < before + 0.02


@pytest.mark.parametrize("seed", range(3))
def test_adapters_learn_too(seed):
    "A policy with adapters of rank 2 raises a rule; with steps of no length it stays where it was."
    def made(lr):
        return with_lora(tiny(seed=seed, loud=8), steps=20, batch=32, lr=lr, kl_coef=0.02, ppo_epochs=2,
                         seed=seed)
    trainer, idle = made(2e-2), made(1e-9)
    before = known(trainer)
    trainer.run()
    for _ in range(3): idle.step()
    assert known(trainer) > before + 0.2 and abs(known(idle) - before) < 0.01
