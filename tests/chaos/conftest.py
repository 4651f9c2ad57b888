"Options of the faults: the seed that all chance comes from, and how many rounds. What fails says how to see it again."
import random
import sys
import time

import pytest


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, help="all chance comes from it; by default the time")
    parser.addoption("--rounds", type=int, default=1, help="how often each fault is tried")


def pytest_configure(config):
    if config.option.seed is None: config.option.seed = int(time.time())
    print(f"seed {config.option.seed}", flush=True)


def pytest_generate_tests(metafunc):
    if "number" in metafunc.fixturenames: metafunc.parametrize("number", range(metafunc.config.option.rounds))


@pytest.fixture
def rng(request):
    "Chance that depends on the seed and the test alone, and not on which tests ran before it."
    return random.Random(f"{request.config.option.seed} {request.node.name}")


def pytest_terminal_summary(terminalreporter, config):
    for report in [*terminalreporter.stats.get("failed", []), *terminalreporter.stats.get("error", [])]:
        terminalreporter.write_line(
            f"Again: {sys.executable} -m pytest -q '{report.nodeid}' --seed {config.option.seed} "
            f"--rounds {config.option.rounds}",
            red=True,
        )
