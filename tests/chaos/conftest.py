"Command-line options: random seed and rounds; a failure prints the command to reproduce it."
import random
import sys
import time

import pytest


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, help="random seed; default: the time")
    parser.addoption("--rounds", type=int, default=1, help="repetitions of each test")


def pytest_configure(config):
    if config.option.seed is None: config.option.seed = int(time.time())
    print(f"seed {config.option.seed}", flush=True)


def pytest_generate_tests(metafunc):
    if "number" in metafunc.fixturenames: metafunc.parametrize("number", range(metafunc.config.option.rounds))


@pytest.fixture
def rng(request):
    "A random generator that depends on the seed and the test only."
    return random.Random(f"{request.config.option.seed} {request.node.name}")


def pytest_terminal_summary(terminalreporter, config):
    for report in [*terminalreporter.stats.get("failed", []), *terminalreporter.stats.get("error", [])]:
        terminalreporter.write_line(
            f"Reproduce: {sys.executable} -m pytest -q '{report.nodeid}' --seed {config.option.seed} "
            f"--rounds {config.option.rounds}",
            red=True,
        )
