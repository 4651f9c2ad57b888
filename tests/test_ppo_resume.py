"`kill -9` inside a PPO step: the resumed run samples the same responses again and ends with the same bits."
import json
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_pretrain  # noqa: F401, I001 (before MLX)

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_pretrain.checkpoint import load_checkpoint
from mlx_pretrain.run import checkpoints, read_metrics

WORKER = Path(__file__).parent / "workers" / "ppo.py"


def work(folder, *killed):
    done = subprocess.run([sys.executable, WORKER, folder, *killed], capture_output=True, text=True,
                          timeout=300, check=False)
    assert done.returncode == (-9 if killed else 0), done.stderr


def end(folder):
    "Last checkpoint, its state, the metrics without the speed, and the scored batches of responses."
    arrays, state = load_checkpoint(checkpoints(folder / "runs" / "run")[-1])
    rows = [row for row in read_metrics(folder / "runs" / "run") if "event" not in row]
    metrics = [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]
    return dict(tree_flatten(arrays)), state, metrics, scored_batches(folder)


def scored_batches(folder):
    return [json.loads(line) for line in (folder / "scored.txt").read_text().splitlines()]


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    work(folder := tmp_path_factory.mktemp("calm"))
    return end(folder)


# A step scores a batch and makes eight updates; two timing steps come before, an evaluation after step 3.
@pytest.mark.long
@pytest.mark.parametrize(("place", "number"), [("sample", 7), ("update", 16 + 3 * 8 + 5)])
def test_killed_in_a_step(place, number, calm, tmp_path):
    work(tmp_path, place, str(number))
    names = [path.name for path in checkpoints(tmp_path / "runs" / "run")]
    n_before = len(scored_batches(tmp_path))
    assert names and names[-1] < "step_000006"
    work(tmp_path)
    arrays, state, metrics, scored = end(tmp_path)
    expected, expected_state, expected_metrics, expected_scored = calm
    assert arrays.keys() == expected.keys()
    assert all(mx.array_equal(arrays[name], expected[name]) for name in expected)
    assert state == expected_state and metrics == expected_metrics
    assert scored[-3:] == expected_scored[-3:] and len(scored) > n_before    # the same responses, once more
