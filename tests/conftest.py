"""Test settings: markers, and the rule that nothing is skipped in CI."""
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import pytest

CACHE = pytest.StashKey()


def set_up_worker(name):
    "Parallel workers share the cores, but not MLX's compiler cache: it has no lock."
    threads = str(max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))
    for variable in ("MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"): os.environ.setdefault(variable, threads)
    shared = Path(tempfile.gettempdir())
    own = shared / f"mlx-pretrain-{name}"
    own.mkdir(exist_ok=True)
    if (shared / "mlx").exists(): shutil.copytree(shared / "mlx", own / "mlx", dirs_exist_ok=True)
    os.environ["TMPDIR"], tempfile.tempdir = str(own), None


def pytest_configure(config):
    # ignored, where a shell started us in the background; tests press Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if worker := os.environ.get("PYTEST_XDIST_WORKER"): set_up_worker(worker)
    config.stash[CACHE] = tempfile.TemporaryDirectory(prefix="mlx-pretrain-")
    os.environ["MLX_PRETRAIN_CACHE"] = config.stash[CACHE].name  # tests keep no tokens in the home directory
    config.addinivalue_line("markers", "long: takes many seconds; `make test` leaves it to `make long`")
    config.addinivalue_line("markers", "nightly: takes a minute, or is one seed of many; see `make nightly`")
    config.addinivalue_line("markers",
                            "linux: what is tested exists on Linux only; elsewhere the test is not collected")


def pytest_unconfigure(config): config.stash[CACHE].cleanup()


def pytest_collection_modifyitems(config, items):
    if sys.platform == "linux": return
    here = [item for item in items if not item.get_closest_marker("linux")]
    config.hook.pytest_deselected([item for item in items if item not in here])
    items[:] = here


def pytest_terminal_summary(terminalreporter):
    skipped = terminalreporter.stats.get("skipped", [])
    if skipped and os.environ.get("CI"):
        terminalreporter.write_line("A skipped test counts as a failure in CI.", red=True)


def pytest_sessionfinish(session):
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") and reporter.stats.get("skipped") and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
