"A run that is interrupted, killed or broken, and resumed, ends bit-identical to an uninterrupted one."
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import mlx_pretrain  # noqa: F401, I001 (before MLX)

from common import equal, lines_of

import mlx.core as mx

from mlx_pretrain.checkpoint import Checkpoint, load_checkpoint
from mlx_pretrain.config import DataError
from mlx_pretrain.pretrain import PretrainConfig, PretrainTrainer, pretrain
from mlx_pretrain.run import ResumeConfig, checkpoints, read_metadata

OPTIMIZERS = ("adam", "adamw", "muon", "sgd")
CUTS = (7, 12, 23)  # inside the first epoch, at its end, inside the second
WORKERS = Path(__file__).parent / "workers"


def config(folder, name, optimizer="adamw", total=30, **more):
    "24 windows of 16 bytes, two a step: an epoch ends after 12 steps."
    data = folder / "data.jsonl"
    if not data.exists():
        data.write_text("".join(json.dumps({"text": f"{i} bottles of beer on the wall"}) + "\n"
                                for i in range(10, 22)))
    return PretrainConfig.model_validate_json(
        json.dumps(
            {
                "name": name,
                "data": {
                    "input_file": str(data),
                    "validation_file": str(data),
                    "preprocessing": {"max_context_size": 16},
                },
                "model": {
                    "dimensions": {"hidden_size": 16, "intermediate_size": 32, "num_layers": 1},
                    "attention": {"num_heads": 2},
                },
                "training": {
                    "hyperparameters": {"batch_size": 2, "learning_rate": 1e-2, "iters": total},
                    "optimization": {"optimizer": optimizer},
                },
                "logging": {
                    "keep_last": 99,
                    "steps": {"logging_interval": 5, "validation_interval": 10, "checkpoint_interval": 1},
                },
                **more,
            }
        )
    )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resume_from_every_step_in_process(optimizer, tmp_path):
    cfg = config(tmp_path, "whole", optimizer, total=20)
    whole, states = PretrainTrainer(cfg), []
    for _ in range(20):
        whole.step()
        arrays = {group: {name: mx.array(np.array(a)) for name, a in tensors.items()}
                  for group, tensors in whole.arrays().items()}
        states.append((arrays, json.loads(json.dumps(whole.state()))))
    for step, (arrays, state) in enumerate(states, 1):
        trainer = PretrainTrainer(cfg)
        trainer.load(Checkpoint(Path("checkpoint"), arrays, state))
        mx.random.seed(step)
        np.random.seed(step)  # noqa: NPY002 (global random state must not matter)
        trainer.run()
        assert trainer.state() == whole.state() and equal(trainer.arrays(), whole.arrays()), step


def test_forgotten_optimizer_state_is_detected(tmp_path):
    cfg = config(tmp_path, "whole", total=20)
    whole, trainer = PretrainTrainer(cfg), PretrainTrainer(cfg)
    for _ in range(10): whole.step()
    trainer.load(Checkpoint(Path("checkpoint"), whole.arrays(), whole.state()), reset_optimizer=True)
    whole.run(); trainer.run()
    assert not equal(trainer.arrays()["model"], whole.arrays()["model"])


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory):
    "One uninterrupted run per optimizer, with a checkpoint after every step, in its own process."
    folder = tmp_path_factory.mktemp("resume")
    for optimizer in OPTIMIZERS:
        for suffix in ("", *(f"-{cut}" for cut in CUTS)):
            resume = (
                {
                    "checkpoint": str(
                        folder / "runs" / optimizer / "checkpoints" / f"step_{int(suffix[1:]):06d}"
                    )
                }
                if suffix
                else {}
            )
            cfg = config(folder, f"{optimizer}{suffix}", optimizer, resume=resume)
            (folder / f"{cfg.name}.json").write_text(cfg.model_dump_json())
    in_process(folder, *OPTIMIZERS)
    return folder


def in_process(folder, *names):
    subprocess.run([sys.executable, WORKERS / "pretrain.py", folder, *names], check=True, timeout=300)


@pytest.mark.parametrize("cut", CUTS)
def test_resume_from_three_steps_in_other_processes(cut, whole_runs):
    in_process(whole_runs, *(f"{optimizer}-{cut}" for optimizer in OPTIMIZERS))
    for optimizer in OPTIMIZERS:
        whole, resumed = (whole_runs / "runs" / name for name in (optimizer, f"{optimizer}-{cut}"))
        (arrays, state), (again, state_again) = (load_checkpoint(checkpoints(run)[-1])
                                                 for run in (whole, resumed))
        assert state["step"] == 30 and state_again == state and equal(again, arrays), optimizer
        assert lines_of(resumed) == [line for line in lines_of(whole) if line["step"] > cut], optimizer
        assert equal(mx.load(str(resumed / "model" / "model.safetensors")),
                     mx.load(str(whole / "model" / "model.safetensors")))


def test_token_cache_truncated_during_training(tmp_path):
    "It ends with an error and a checkpoint, and resumes to the same bits."
    def damage(trainer, metrics):
        if metrics["step"] == 13: os.truncate(trainer.data.tokens.folder / "tokens.bin", 2)

    rare = {"logging": {"steps": {"checkpoint_interval": 100, "validation_interval": 100}}}
    whole, cut = (config(tmp_path, name, total=20, **rare) for name in ("whole", "cut"))
    pretrain(whole, tmp_path / "runs")
    with pytest.raises(DataError, match="was cut off while it was in use; start again"):
        pretrain(cut, tmp_path / "runs", callbacks=[damage])
    assert checkpoints(tmp_path / "runs" / "cut")[-1].name == "step_000013"
    pretrain(cut.model_copy(update={"resume": ResumeConfig(checkpoint="latest")}), tmp_path / "runs")
    (arrays, state), (again, state_again) = (load_checkpoint(checkpoints(tmp_path / "runs" / name)[-1])
                                             for name in ("whole", "cut"))
    assert state_again == state and equal(again, arrays)


def test_finished_run_without_its_model_exports_it_again(tmp_path, capsys):
    run = pretrain(config(tmp_path, "whole"), tmp_path)
    before = (run / "model/model.safetensors").read_bytes()
    again = config(tmp_path, "whole", resume={"checkpoint": "latest"})
    pretrain(again, tmp_path)
    assert "Run already completed (30 steps)" in capsys.readouterr().out
    shutil.rmtree(run / "model")
    pretrain(again, tmp_path)
    assert (run / "model/model.safetensors").read_bytes() == before and read_metadata(run)[
        "outcome"
    ] == "finished"
