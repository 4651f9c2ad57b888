"A pretraining run follows its configuration; what a resumed run accepts and reports."
import json
import logging
from pathlib import Path

import pytest

import mlx_pretrain  # noqa: F401, I001 (before MLX)

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_pretrain.pretrain import PretrainConfig, PretrainTrainer, pretrain
from mlx_pretrain.pretrained import PretrainedError, load
from mlx_pretrain.run import RunError, checkpoints, latest_checkpoint, read_metrics
from mlx_pretrain.tokenizer import load_tokenizer


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("train.jsonl", "bottles of beer")
    write("val.jsonl", "bottles of milk")

    def make(**sections):
        values = {"name": "run", "data": {"input_file": "train.jsonl", "validation_file": "val.jsonl",
                                          "preprocessing": {"max_context_size": 16}},
                  "model": {"dimensions": {"hidden_size": 16, "intermediate_size": 32, "num_layers": 2}},
                  "training": {"hyperparameters": {"batch_size": 2, "learning_rate": 1e-2, "iters": 6}},
                  "logging": {"steps": {"validation_interval": 3, "checkpoint_interval": 2}}}
        for key, value in sections.items():
            *parents, last = key.split("__")
            section = values
            for parent in parents: section = section.setdefault(parent, {})
            section[last] = value
        return PretrainConfig.model_validate_json(json.dumps(values))
    return make


def write(name, what):
    Path(name).write_text("".join(json.dumps({"text": f"{i} {what} on the wall"}) + "\n"
                                  for i in range(10, 20)))


ITERS, LATEST = "training__hyperparameters__iters", {"resume__checkpoint": "latest"}


@pytest.mark.parametrize("batch_size, accumulate, epochs",
                         [(2, 1, 1), (3, 1, 2), (2, 3, 1), (4, 5, 2), (7, 2, 3)])
def test_every_target_once_per_epoch(config, batch_size, accumulate, epochs):
    cfg = config(training={"epochs": epochs,
                           "hyperparameters": {"batch_size": batch_size,
                                               "gradient_accumulation_steps": accumulate}})
    trainer = PretrainTrainer(cfg)
    n = len(trainer.data)
    assert trainer.total_steps == -(-n * epochs // (batch_size * accumulate))
    trainer.run()
    assert trainer.tokens == epochs * trainer.data.n_targets
    with pytest.raises(ValueError, match="after the end"): trainer.batches_at(trainer.total_steps)


def test_checkpointing_reaches_the_model(config, monkeypatch):
    calls, original = [], mx.checkpoint
    monkeypatch.setattr(mx, "checkpoint", lambda f: calls.append(f) or original(f))
    PretrainTrainer(config()).step()
    assert not calls
    plain, less = PretrainTrainer(config()), PretrainTrainer(config(system__gradient_checkpointing=True))
    assert abs(plain.step()["grad_norm"] / less.step()["grad_norm"] - 1) < 1e-4 and len(calls) == 2


def test_precision_reaches_the_loss(config):
    exact, auto, narrow = (PretrainTrainer(config(system__precision=p)).step()
                           for p in ("float32", "auto", "bfloat16"))
    if mx.default_device().type == mx.cpu: assert auto["loss"] == exact["loss"]
    assert 0 < abs(narrow["loss"] - exact["loss"]) < 0.02
    trainer = PretrainTrainer(config(system__precision="bfloat16"))
    trainer.step()
    assert {v.dtype for _, v in tree_flatten(trainer.arrays())} <= {mx.float32, mx.uint64}


def test_forecast_is_printed_first(config, capsys):
    pretrain(config())
    output = capsys.readouterr().out
    places = [output.index(text) for text in ("parameters", "Estimated time", "tokens/s", "Took")]
    assert places == sorted(places)
    assert (
        "Estimated time" in Path("runs/run/logs/log.txt").read_text()
        and "ended: finished" in Path("runs/run/logs/log.txt").read_text()
    )


def test_optimizer_is_reset_once(config, caplog):
    "The optimizer is reset if configured, and not again when the same command resumes later."
    pretrain(config())
    pretrain(config(**LATEST, **{ITERS: 9}, resume__reset_optimizer=True))
    assert latest_checkpoint("runs/run").arrays["optimizer"]["step"].item() == 3
    pretrain(config(**LATEST, **{ITERS: 12}, resume__reset_optimizer=True))
    assert (
        latest_checkpoint("runs/run").arrays["optimizer"]["step"].item() == 6
        and "reset before" in caplog.text
    )


def test_other_text_is_a_warning(config, caplog):
    pretrain(config())
    caplog.clear()
    pretrain(config(**LATEST, **{ITERS: 8}))
    assert "not what it was" not in caplog.text
    write("train.jsonl", "cups of tea")
    pretrain(config(**LATEST, **{ITERS: 10}))
    assert (
        "The training data or their chunking changed since the checkpoint." in caplog.text
        and "held-out" not in caplog.text
    )


def test_another_preprocessing_function_is_a_warning(config, caplog):
    Path("mine.py").write_text("def f(row): return row\n")
    pretrain(config(data__preprocess="mine.py:f"))
    Path("mine.py").write_text("def f(row): return {'text': row['text'].upper()}\n")
    pretrain(config(**LATEST, **{ITERS: 8}, data__preprocess="mine.py:f"))
    assert "The training data or their chunking changed since the checkpoint." in caplog.text


def test_best_is_reset_with_other_held_out_text(config, caplog):
    pretrain(config())
    first = latest_checkpoint("runs/run").state["progress"]["best"]
    write("val.jsonl", "zzzzzzzzzzzzz")
    pretrain(config(**LATEST, **{ITERS: 9}))
    best = latest_checkpoint("runs/run").state["progress"]["best"]
    assert "tracking is reset" in caplog.text and best[0] == 9 and best[1] > first[1]


def test_completed_run_is_left_unchanged(config, capsys):
    path = pretrain(config())
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    pretrain(config(**LATEST))
    assert "Run already completed (6 steps)" in capsys.readouterr().out
    assert {p: p.read_bytes()
            for p in path.rglob("*") if p.is_file()} == before and not list(path.parent.glob(".*"))


def test_branch_of_a_finished_run_is_not_finished(config):
    pretrain(config())
    pretrain(config(name="branch", system__seed=7))
    pretrain(config(name="branch", resume__checkpoint="runs/run", overwrite=True))
    weights = [load(f"runs/{name}").model.parameters() for name in ("run", "branch")]
    assert all(mx.array_equal(a, b) for (_, a), (_, b) in zip(*map(tree_flatten, weights)))


def test_duration_adds_up_over_resumes(config):
    pretrain(config())
    took = json.loads(Path("runs/run/metadata.json").read_text())["took"]
    pretrain(config(**LATEST, **{ITERS: 12}))
    again = json.loads(Path("runs/run/metadata.json").read_text())["took"]
    assert (
        again["seconds"] > took["seconds"]
        and again["tokens"] == read_metrics("runs/run")[-1]["tokens"] > took["tokens"]
    )


def test_exported_model_of_an_earlier_end_does_not_count(config):
    def stop(trainer, metrics): trainer.stop_requested = metrics["step"] == 8
    pretrain(config())
    with pytest.raises(KeyboardInterrupt): pretrain(config(**LATEST, **{ITERS: 20}), callbacks=[stop])
    with pytest.raises(PretrainedError, match="no finished model yet.*step_000008"): load("runs/run")
    assert load(checkpoints("runs/run")[-1]).model is not None


def test_tokenizer_that_cannot_be_saved_frees_the_run_name(config, monkeypatch):
    def fails(self, directory): raise OSError("full")
    cfg = config()
    with monkeypatch.context() as patched:
        patched.setattr("mlx_pretrain.tokenizer.Tokenizer.save", fails)
        with pytest.raises(OSError, match="full"): pretrain(cfg)
    assert json.loads(Path("runs/run/metadata.json").read_text())["outcome"] == "failed" and not list(
        Path("runs").glob(".*")
    )
    pretrain(cfg)


def test_resume_keeps_the_tokenizer_files(config):
    path = pretrain(config())
    before = {p: p.stat().st_mtime_ns for p in (path / "tokenizer").iterdir()}
    pretrain(config(**LATEST, **{ITERS: 8}, data__tokenizer_path="runs/run/tokenizer"))
    assert {p: p.stat().st_mtime_ns for p in (path / "tokenizer").iterdir()} == before
    assert load_tokenizer(path / "tokenizer").vocab_size == 259


def test_checkpoint_outside_a_run(config, caplog):
    path = pretrain(config())
    caplog.set_level(logging.WARNING)
    checkpoints(path)[-1].rename("step_000006")
    Path("config.yaml").write_text("name: somebody else's\n")
    pretrain(config(name="branch", resume__checkpoint="step_000006", **{ITERS: 8}))
    assert not caplog.text and [p.name for p in checkpoints("runs/branch")][-1] == "step_000008"


def test_unwritable_directory_is_reported_first(config):
    Path("runs").write_text("a file")
    with pytest.raises(RunError, match="runs is not a directory"): pretrain(config())
