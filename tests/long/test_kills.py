"A training that is killed sixty times saves what an undisturbed one saves."
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import mlx_pretrain  # noqa: F401, I001 (before MLX)

from common import equal, lines_of


from mlx_pretrain.checkpoint import load_checkpoint
from mlx_pretrain.run import RunError, checkpoints, latest_checkpoint

WORKERS = Path(__file__).parents[1] / "workers"


# Kill -9. The worker trains a small model as fast as it can and saves every few steps, so that it spends most
# of its time saving.


def live(folder, *words, seconds=None):
    "Let the worker train until its end, or for some seconds after it has begun. Was it killed?"
    worker = subprocess.Popen([sys.executable, WORKERS / "line.py", folder, *words], stdout=subprocess.PIPE,
                              text=True)
    with worker:
        begun = worker.stdout.readline()
        if seconds is not None:
            assert begun == "begun\n"
            time.sleep(seconds)
            worker.kill()
        worker.communicate()
    assert worker.returncode in (0, -signal.SIGKILL)
    return worker.returncode != 0


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    "The uninterrupted run, with all its checkpoints."
    folder = tmp_path_factory.mktemp("truth")
    assert not live(folder, "keep")
    return folder / "line"


@pytest.mark.nightly
def test_sixty_kills_lose_nothing(truth, tmp_path):
    moments, kills, seen = random.Random(0), 0, set()
    while kills < 60:
        if not live(tmp_path, seconds=moments.uniform(0, 0.12)):
            pytest.fail(f"it reached its end after {kills} kills: make it longer")
        kills += 1
        saved = latest_checkpoint(tmp_path / "line")
        if saved is None: continue
        arrays, state = load_checkpoint(truth / "checkpoints" / saved.path.name)
        assert equal(saved.arrays, arrays) and saved.state == state
        seen.add(state["step"])
    assert len(seen) > 10 and not live(tmp_path)
    (arrays, state), (again, state_again) = (load_checkpoint(checkpoints(run)[-1])
                                             for run in (truth, tmp_path / "line"))
    assert state_again == state and equal(again, arrays)
    assert lines_of(tmp_path / "line") == lines_of(truth)
    assert not [path for path in tmp_path.rglob(".*")], "the dead left something behind"


def test_saving_in_place_loses_checkpoints(tmp_path):
    "The control: the same worker without the rename. Some kill must find the only checkpoint half written."
    moments = random.Random(0)
    for _ in range(20):
        shutil.rmtree(tmp_path / "line", ignore_errors=True)
        live(tmp_path, "in-place", seconds=moments.uniform(0.05, 0.25))
        try: latest_checkpoint(tmp_path / "line")
        except RunError: return
    pytest.fail("twenty kills, and a saver that must fail did not")
