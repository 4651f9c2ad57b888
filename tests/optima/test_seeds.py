"The known optima, and the guards, on four more seeds."
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import test_ppo_optima as one  # noqa: E402

SEEDS = pytest.mark.parametrize("seed", range(1, 5))


@SEEDS
@pytest.mark.parametrize("kl_coef", [0.3, 1.0, 3.0])
def test_a_bandit_finds_the_tilted_reference(kl_coef, seed): one.test_a_bandit_finds_the_tilted_reference(kl_coef, seed)


@SEEDS
@pytest.mark.parametrize("name", one.TASKS)
def test_the_best_reward_is_found(name, seed): one.test_the_best_reward_is_found(name, seed)


@SEEDS
def test_a_high_price_keeps_the_policy_home(seed): one.test_a_high_price_keeps_the_policy_home(seed)


@SEEDS
def test_guards_stop_a_wild_training_and_leave_a_healthy_one_alone(seed, caplog):
    one.test_guards_stop_a_wild_training_and_leave_a_healthy_one_alone(caplog, seed)
