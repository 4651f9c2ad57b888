"`kill -9` inside a step of PPO: the resumed run samples the same responses again, and ends in the same bits."
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
    "The last checkpoint, the metrics without the speed, and each batch of responses that was scored, in order."
    arrays, state = load_checkpoint(checkpoints(folder / "runs" / "run")[-1])
    rows = [row for row in read_metrics(folder / "runs" / "run") if "event" not in row]
    lines = [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]
    return (
        dict(tree_flatten(arrays)),
        state,
        lines,
        [json.loads(line) for line in (folder / "said.txt").read_text().splitlines()],
    )


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    work(folder := tmp_path_factory.mktemp("calm"))
    return end(folder)


# A step scores one batch and takes eight updates; two steps of forecast come before, and a validation scores after the third.
@pytest.mark.long
@pytest.mark.parametrize(("place", "number"), [("sample", 7), ("update", 16 + 3 * 8 + 5)])
def test_killed_in_a_step(place, number, calm, tmp_path):
    work(tmp_path, place, str(number))
    kept = [path.name for path in checkpoints(tmp_path / "runs" / "run")]
    before = len((tmp_path / "said.txt").read_text().splitlines())
    assert kept and kept[-1] < "step_000006"
    work(tmp_path)
    arrays, state, lines, said = end(tmp_path)
    wanted, wanted_state, wanted_lines, wanted_said = calm
    assert arrays.keys() == wanted.keys() and all(mx.array_equal(arrays[name], wanted[name])
                                                  for name in wanted)
    assert state == wanted_state and lines == wanted_lines
    assert said[-3:] == wanted_said[-3:] and len(said) > before              # the same responses, once more
