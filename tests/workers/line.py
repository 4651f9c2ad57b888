"Fit a line and save often, resuming from the newest checkpoint: `line.py FOLDER [keep | in-place]`."
import shutil
import sys
from typing import NamedTuple

import mlx_pretrain  # noqa: F401, I001 (before MLX)

import mlx.core as mx

from mlx_pretrain.checkpoint import write_checkpoint_files
from mlx_pretrain.core import key_for
from mlx_pretrain.model import Linear, project
from mlx_pretrain.run import LoggingConfig, ResumeConfig, Run, StepsConfig, find_checkpoint
from mlx_pretrain.session import recording
from mlx_pretrain.trainer import Trainer

folder, how = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else ""
logging = LoggingConfig(keep_last=10_000 if how == "keep" else 3,
                        steps=StepsConfig(checkpoint_interval=1 if how == "in-place" else 4))


class Points(NamedTuple):
    x: mx.array
    y: mx.array


def points_at(step):
    if step == first + 1: print("begun", flush=True)  # the step before has compiled everything
    x = mx.random.normal((64, 128), key=key_for(0, step, "points"))
    return Points(x, x.sum(axis=1))


def squares(model, batch):
    return ((project(batch.x, model)[0].mean(axis=1) - batch.y) ** 2).sum(), mx.array(64)


class InPlace(Run):
    "What most programs do: write over the one file there is."
    def save_checkpoint(self, step, arrays, state, best=None):
        place = self.path / "checkpoints" / "step_000001"
        shutil.rmtree(place, ignore_errors=True)
        write_checkpoint_files(place, arrays, {**state, "step": step})
        return place


found = find_checkpoint(ResumeConfig(checkpoint="latest"), f"{folder}/line") if how != "in-place" else None
trainer = Trainer(Linear(128, 64), squares, points_at, 6000)
if found: trainer.load(found)
first = trainer.steps_done
if found: run = Run.resume(found, "line", "seed: 0\n", root=folder, logging=logging)
else:
    run = (InPlace if how == "in-place" else Run)("line", "seed: 0\n", root=folder, overwrite=True,
                                                  logging=logging)
trainer.run_dir = run
with recording(trainer, run, finalize=lambda: None): trainer.run()
