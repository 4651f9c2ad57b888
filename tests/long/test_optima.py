"PPO on tasks whose optimal policy is known, and its guards on healthy and diverging runs, on five seeds."
import logging
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from toys import mean_reward, planted, task  # noqa: E402

import mlx_pretrain  # noqa: F401, I001 (before MLX)

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_pretrain import ppo
from mlx_pretrain.trainer import TrainingError

NIGHTLY = [pytest.param(seed, marks=pytest.mark.nightly) for seed in (2, 3, 4)]
SEEDS = pytest.mark.parametrize("seed", [0, 1, *NIGHTLY])

# One token; vocabulary: pad, bos, eos and six letters; the reward of a letter is WORTH, of anything else 0;
# 60 steps of 64 samples, four epochs of one update each; learning rate to 0.
# Optimum: π*(y) ∝ π_ref(y) · exp(r(y) / kl_coef).
WORTH = dict(zip("abcdef", (1.0, 0.5, 0.0, -0.5, 0.2, 0.8)))


def off_optimum(kl_coef, seed=0):
    "Total variation between the policy and the known optimum, and how far that is from the reference."
    trainer = task(lambda prompt, response: WORTH.get(response, 0.0), "abcdef", seed=seed, steps=60,
                   response_length=1, kl_coef=kl_coef, ppo_mini_batch_size=64)
    trainer.run()
    ref, got = (np.array(mx.softmax(model(mx.array([[1]]))[0, -1]))
                for model in (trainer.reference, trainer.model))
    best = ref * np.exp(np.array([0, 0, 0, *WORTH.values()]) / kl_coef)
    best /= best.sum()
    return 0.5 * np.abs(got - best).sum(), 0.5 * np.abs(ref - best).sum()


@SEEDS
@pytest.mark.parametrize("kl_coef", [0.3, 1.0, 3.0])
def test_a_bandit_finds_the_tilted_reference(kl_coef, seed):
    "The complete distribution, not only the best reward."
    off, distance = off_optimum(kl_coef, seed)
    assert off < 0.02 < distance


@pytest.mark.parametrize(("right", "wrong"), {
    "no KL penalty": ("-kl_coef * (logp - ref_logp)", "0 * (logp - ref_logp)"),
    "twice the KL penalty": ("-kl_coef", "-2 * kl_coef"),
    "a KL bonus": ("-kl_coef", "kl_coef"),
    "half the score": ("+= scores", "+= 0.5 * scores")}.values())
def test_a_wrong_objective_misses_the_optimum(right, wrong, monkeypatch):
    monkeypatch.setattr(ppo, "token_rewards", planted(ppo.token_rewards, right, wrong))
    try: off, _ = off_optimum(1.0)
    except TrainingError: return
    assert off > 0.02


def test_k3_as_a_penalty_misses_the_optimum(monkeypatch):
    "Why the penalty is k1."
    k3 = "(np.expm1(ref_logp - logp) + logp - ref_logp)"
    monkeypatch.setattr(ppo, "token_rewards", planted(ppo.token_rewards, "(logp - ref_logp)", k3))
    off, _ = off_optimum(1.0)
    assert off > 0.02


# Vocabulary: pad, bos, eos and eight letters; up to 8 tokens; the reward is the share of them that is `a`.
# Optimum: 1, by eight times `a`.
def count(prompt, response): return response.count("a") / 8


# Vocabulary: pad, bos, eos and ()[]; the prompt opens one, two or three brackets; up to 6 tokens. Each
# leading closing bracket counts 1, any other token −1, divided by the number of brackets. Optimum: 1, by
# closing all and ending.
def close(prompt, response):
    n, right = prompt.count("("), 0
    while right < n and response[right:right + 1] == ")": right += 1
    return (right - (len(response) - right)) / n


# Vocabulary: pad, bos, eos and four letters; up to 10 tokens; the reward falls with the distance of the
# length from 5. Optimum: 1, by five letters and the end.
def timing(prompt, response): return 1 - abs(len(response) - 5) / 5


TASKS = { # reward, letters, prompts, length, steps of 64 samples, each with four updates
    "count": (count, "abcdefgh", ("",), 8, 60), "close": (close, "()[]", ("(", "((", "((("), 6, 100),
    "timing": (timing, "abcd", ("",), 10, 60)}


@SEEDS
@pytest.mark.parametrize("name", TASKS)
def test_the_best_reward_is_found(name, seed):
    "With kl_coef 0, within the budget of steps, on every seed: at least 95 % of the best possible reward."
    reward, letters, prompts, length, steps = TASKS[name]
    trainer = task(reward, letters, prompts, seed=seed, steps=steps, response_length=length, kl_coef=0.0,
                   end=0.1, ppo_mini_batch_size=64)
    first = mean_reward(trainer)
    trainer.run()
    assert first < 0.6 and mean_reward(trainer) >= 0.95


@pytest.mark.parametrize(("right", "wrong"), [
    ("policy_loss(logp, rows", "policy_loss(mx.stop_gradient(logp), rows"),
    ("rows.advantages", "-rows.advantages"),
    ("rows.advantages", "rows.returns * 0")])
def test_a_broken_loss_learns_nothing(right, wrong, monkeypatch):
    monkeypatch.setattr(ppo, "ppo_loss", planted(ppo.ppo_loss, right, wrong))
    trainer = task(count, steps=15, response_length=8, kl_coef=0.0)
    trainer.run()
    assert mean_reward(trainer) < 0.3


def test_without_a_reward_the_policy_does_not_change():
    "With a reward of 0 the weights stay the same, bit for bit."
    trainer = task(lambda prompt, response: 0.0, steps=10, response_length=8)
    trainer.run()
    policy, reference = (dict(tree_flatten(model.parameters()))
                         for model in (trainer.model, trainer.reference))
    assert all(mx.array_equal(policy[name], reference[name]) for name in reference)


def test_without_a_reward_the_policy_returns_to_the_reference():
    "With a reward of 0, a policy that is not the reference returns to it."
    trainer = task(lambda prompt, response: 0.0, steps=60, response_length=4, kl_coef=1.0)
    trainer.model.lm_head.weight = trainer.model.lm_head.weight + 0.15 * mx.random.normal(
        (11, 32), key=mx.random.key(0)
    )
    curve = [trainer.step()["kl"] for _ in range(60)]
    assert curve[0] > 0.2 and np.mean(curve[-10:]) < 0.1 * curve[0]


@SEEDS
def test_a_high_kl_coef_keeps_the_policy_at_the_reference(seed):
    trainer = task(count, seed=seed, steps=20, response_length=8, kl_coef=100.0, lr=1e-3)
    trainer.run()
    assert abs(current_kl(trainer)) < 0.01


def current_kl(trainer):
    "The KL of the current policy, on many samples."
    sampled = trainer.sample(trainer.data, np.zeros(512, int), {"temperature": 1.0}, -3)
    return trainer.score_samples(sampled, trainer.knobs.snapshot())[1]["kl"]


@SEEDS
def test_guards_stop_only_a_diverging_training(seed, caplog):
    "With a thousand times the learning rate they stop it within three steps."
    caplog.set_level(logging.WARNING)
    healthy = task(count, seed=seed, steps=25, response_length=8, kl_coef=0.05)
    healthy.run()
    assert not caplog.records and not any(healthy.guards.consecutive.values()) and mean_reward(healthy) > 0.3
    wild = task(count, seed=seed, steps=25, response_length=8, kl_coef=0.05, lr=3.0)
    with pytest.raises(TrainingError, match='lower "training.hyperparameters.learning_rate"'): wild.run()
    assert wild.steps_done <= 3
