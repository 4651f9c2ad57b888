"A run that resumes with other settings continues after the rows it has taken: each is seen once per epoch."
import json
import logging
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import mlx_pretrain  # noqa: F401, I001 (before MLX)

from common import check_sentence, forall
from hypothesis import strategies as st
from toys import tiny

from mlx_pretrain.checkpoint import Checkpoint, load_checkpoint, write_checkpoint
from mlx_pretrain.config import load_config
from mlx_pretrain.data import Windows
from mlx_pretrain.lab import Live
from mlx_pretrain.ppo import PPOConfig, PPOTrainer
from mlx_pretrain.preferences import PreferenceDataset
from mlx_pretrain.pretrain import PretrainConfig, PretrainTrainer
from mlx_pretrain.reward import RewardConfig, RewardTrainer
from mlx_pretrain.rows import SFTDataset
from mlx_pretrain.run import RunError, read_metadata, read_metrics
from mlx_pretrain.sampler import LengthGroupedSampler, Segment, ShuffledSampler, resume_sampler
from mlx_pretrain.sft import SFTConfig, SFTTrainer, sft

KINDS = pytest.mark.parametrize("kind", [ShuffledSampler, LengthGroupedSampler])


# ---- which rows a step takes

# batch size, accumulation, seed
SETTINGS = st.tuples(st.integers(1, 6), st.integers(1, 2), st.integers(0, 2))
# steps until a change, and the change
CUTS = st.lists(st.tuples(st.integers(1, 6), SETTINGS), min_size=2, max_size=8)


def take(sampler, steps, seen):
    for step in steps:
        batches = sampler.batches(step)
        seen.update(row for rows in batches for row in rows.tolist() if row >= 0)
        assert len(batches) <= sampler.last.accumulation and all(
            len(rows) <= sampler.last.batch_size for rows in batches
        )
        assert [rows.tolist() for rows in sampler.batches(step)] == [rows.tolist() for rows in batches]


def train(kind, lengths, epochs, settings, cuts, resume=resume_sampler):
    "How often each row is seen by a run whose settings change repeatedly, through the JSON of a checkpoint."
    seen, step = Counter(), 0
    sampler = kind(lengths, epochs, [Segment(0, *settings)])
    for steps, new in cuts:
        until = min(step + steps, sampler.end)
        take(sampler, range(step, until), seen)
        if resume is resume_sampler: assert sampler.seen(until) == sum(seen.values())
        sampler, step = resume(kind(lengths, epochs, [Segment(0, *new)]),
                               json.loads(json.dumps(sampler.state())), until), until
    take(sampler, range(step, sampler.end), seen)
    return seen


@KINDS
@forall(200, n=st.integers(1, 60), epochs=st.integers(1, 4), settings=SETTINGS, cuts=CUTS)
def test_each_row_is_seen_once_per_epoch(kind, n, epochs, settings, cuts):
    lengths = np.random.default_rng(n).integers(2, 300, n)
    assert train(kind, lengths, epochs, settings, cuts) == dict.fromkeys(range(n), epochs)


def by_steps(sampler, saved, step): return sampler


def without_the_earlier_segments(sampler, saved, step):
    "Knows how many rows were taken, but not which."
    now = resume_sampler(sampler, saved, step)
    return type(now)(now.rows, now.epochs,
                     [Segment(0, now.last.row, 1, 9), now.last] if now.last.row else [now.last], now.step,
                     now.epoch)


@KINDS
@pytest.mark.parametrize("wrong", [by_steps, without_the_earlier_segments])
def test_wrong_position_is_detected(kind, wrong):
    lengths, cuts = np.arange(2, 52), [(4, (8, 1, 0)), (2, (3, 1, 0))]
    assert train(kind, lengths, 2, (4, 1, 0), cuts) == dict.fromkeys(range(50), 2)
    assert train(kind, lengths, 2, (4, 1, 0), cuts, wrong) != dict.fromkeys(range(50), 2)


@KINDS
@forall(100, n=st.integers(1, 60), settings=SETTINGS, cuts=st.lists(st.integers(0, 12), max_size=4))
def test_same_settings_equal_the_uninterrupted_run(kind, n, settings, cuts):
    lengths = np.random.default_rng(n).integers(2, 300, n)
    fresh = sampler = kind(lengths, 3, [Segment(0, *settings)])
    for step in np.minimum(np.cumsum(cuts), fresh.end).tolist():
        sampler = resume_sampler(fresh, json.loads(json.dumps(sampler.state())), step)
        assert sampler.state() == fresh.state() and sampler.end == fresh.end
        for at in range(step, fresh.end):
            assert np.array_equal(np.concatenate(sampler.batches(at)), np.concatenate(fresh.batches(at)))


@KINDS
@pytest.mark.parametrize("step", [3, 5, 10])
def test_more_epochs(kind, step):
    "In the middle, and after a last step that was not full: 19 rows by fours."
    seen, once = Counter(), kind(np.arange(2, 21), 1, [Segment(0, 4, 1, 0)])
    take(once, range(min(step, once.end)), seen)
    thrice = resume_sampler(kind(np.arange(2, 21), 3, [Segment(0, 4, 1, 0)]), once.state(),
                            min(step, once.end))
    take(thrice, range(min(step, once.end), thrice.end), seen)
    assert seen == dict.fromkeys(range(19), 3)


@KINDS
def test_other_rows_restart_the_epoch(kind):
    "Thirty rows become forty in the middle of the second epoch of three: each of the forty is seen twice."
    seen, before = Counter(), kind(np.arange(2, 32), 3, [Segment(0, 4, 1, 0)])
    after = resume_sampler(kind(np.arange(2, 42), 3, [Segment(0, 4, 1, 0)]), before.state(), 10,
                           same_rows=False)
    take(after, range(10, after.end), seen)
    assert seen == dict.fromkeys(range(40), 2)


def test_segments_by_hand():
    "Ten rows in order of their seed: after two steps of three rows, and one of two, the last two are left."
    order = np.concatenate(ShuffledSampler(range(10), 1, [Segment(0, 10, 1, 5)]).batches(0)).tolist()
    sampler = ShuffledSampler(range(10), 1, [Segment(0, 3, 1, 5)])
    sampler = resume_sampler(ShuffledSampler(range(10), 1, [Segment(0, 2, 1, 5)]), sampler.state(), 2)
    assert (sampler.left.tolist(), sampler.end, sampler.seen(3)) == (order[6:], 4, 8)
    again = resume_sampler(ShuffledSampler(range(10), 1, [Segment(0, 1, 2, 5)]), sampler.state(), 3)
    assert sorted(again.left.tolist()) == sorted(set(order[6:]) - {*sampler.batches(2)[0].tolist()})
    assert [s.row for s in again.segments] == [0, 6, 8] and again.end == 4
    next_epoch = resume_sampler(ShuffledSampler(range(10), 2, [Segment(0, 4, 1, 5)]),
                                {**again.state(), "epochs": 2}, 5)
    # those of the first epoch are of no use now
    assert (next_epoch.epoch, [s.row for s in next_epoch.segments]) == (1, [0, 2])


# ---- each stage, trained

TEXTS = [{"text": "x" * n} for n in range(20, 60)]
ANSWERS = [{"instruction": f"Count to {i}.", "response": " ".join(map(str, range(i)))} for i in range(1, 23)]
PAIRS = [{"prompt": "", "chosen": "a" * (1 + i % 7), "rejected": "b" * (1 + i % 3)} for i in range(22)]
PROMPTS = [{"prompt": a + b} for a in "abcd" for b in "abcdef"][:22]
MODEL = {"dimensions": {"hidden_size": 16, "intermediate_size": 32, "num_layers": 1},
         "attention": {"num_heads": 2}}


def write(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def made(stage, tmp_path, batch, epochs=2, asked=None, rows=None, **hyper):
    "A trainer of a stage, on 22 rows (or some windows)."
    default = {"pretrain": TEXTS, "sft": ANSWERS, "reward": PAIRS, "ppo": PROMPTS}[stage]
    data = {"input_file": write(tmp_path / f"{stage}.jsonl", rows or default)}
    cfg = {"data": data, "training": {"epochs": epochs,
                                      "hyperparameters": {"batch_size": batch, "learning_rate": 1e-3,
                                                          **hyper}}}
    if stage == "pretrain":
        data["preprocessing"] = {"max_context_size": 64}
        return PretrainTrainer(PretrainConfig.model_validate_json(json.dumps({**cfg, "model": MODEL})))
    if stage == "sft": return SFTTrainer(SFTConfig.model_validate_json(json.dumps({**cfg, "model": MODEL})))
    if stage == "reward": return RewardTrainer(RewardConfig.model_validate_json(json.dumps(cfg)), tiny())
    data |= {"response_length": 3, "ppo_mini_batch_size": 4}

    def reward(prompt, response):
        asked[prompt] += 1
        return 0.0
    return PPOTrainer(PPOConfig.model_validate_json(json.dumps(cfg)), tiny(), reward=reward)


@pytest.fixture
def counted(monkeypatch):
    "How often each row was part of a batch, or for PPO its prompt was sampled."
    seen = Counter()
    for kind in (Windows, SFTDataset, PreferenceDataset):
        def batch(self, indices, before=kind.batch):
            seen.update(int(i) for i in indices if i >= 0)
            return before(self, indices)
        monkeypatch.setattr(kind, "batch", batch)
    return seen


def resumed(trainer, other):
    "Another trainer, continued from the state of the first."
    other.load(Checkpoint(Path("checkpoint"), trainer.arrays(), json.loads(json.dumps(trainer.state()))))
    return other


STAGES = pytest.mark.parametrize("stage", ["pretrain", "sft", "reward", "ppo"])


@STAGES
def test_another_batch_size_twice_in_an_epoch(stage, tmp_path, counted, caplog):
    trainer = made(stage, tmp_path, 4, asked=counted)
    for _ in range(2): trainer.step()
    trainer = resumed(trainer, made(stage, tmp_path, 3, asked=counted))
    for _ in range(2): trainer.step()
    trainer = resumed(trainer, made(stage, tmp_path, 5, asked=counted, gradient_accumulation_steps=2))
    trainer.run()
    assert trainer.steps_done == trainer.total_steps
    assert len(counted) == len(trainer.data) and {*counted.values()} == {2}, counted


@STAGES
def test_raised_epochs_are_trained(stage, tmp_path, counted):
    trainer = made(stage, tmp_path, 4, epochs=1, asked=counted)
    trainer.run()
    assert {*counted.values()} == {1}
    resumed(trainer, made(stage, tmp_path, 4, epochs=3, asked=counted)).run()
    assert len(counted) == len(trainer.data) and {*counted.values()} == {3}, counted


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_counting_steps_instead_of_rows_is_detected(stage, tmp_path, counted, monkeypatch):
    "The control: the position is the step number."
    monkeypatch.setattr("mlx_pretrain.stage.resume_sampler", lambda sampler, saved, step, same: sampler)
    trainer = made(stage, tmp_path, 4, asked=counted)
    for _ in range(3): trainer.step()
    resumed(trainer, made(stage, tmp_path, 2, asked=counted)).run()
    assert {*counted.values()} != {2}


def test_iters_count_steps_and_rows_keep_their_order(tmp_path, counted):
    "22 rows by fours for three steps, the ten that are left by fives, and four steps of the second epoch."
    trainer = made("sft", tmp_path, 4, iters=9)
    for _ in range(3): trainer.step()
    trainer = resumed(trainer, made("sft", tmp_path, 5, iters=9))
    trainer.run()
    assert trainer.steps_done == 9 and sorted(counted.values()) == [1] * 2 + [2] * 20


# ---- the learning rate

def test_the_schedule_follows_the_rows(tmp_path):
    "Half of the rows in batches of four, the rest of two: the rate continues from the middle to its end."
    four, two = made("pretrain", tmp_path, 4), made("pretrain", tmp_path, 2)
    whole = two.schedule
    four.steps_done = four.total_steps // 2
    trainer = resumed(four, made("pretrain", tmp_path, 2))
    left = trainer.total_steps - trainer.steps_done
    assert abs(left - two.total_steps / 2) <= 1
    rates = [trainer.schedule(step) for step in range(trainer.steps_done, trainer.total_steps)]
    assert rates == [whole(step) for step in range(two.total_steps - left, two.total_steps)]
    assert abs(rates[0] / four.schedule(four.steps_done) - 1) < 0.1 and rates[-1] == four.schedule(
        four.total_steps - 1
    )


def test_with_iters_the_schedule_follows_the_steps(tmp_path):
    before, after = (made("pretrain", tmp_path, batch, iters=20) for batch in (4, 2))
    before.steps_done = 8
    want = [after.schedule(step) for step in range(20)]
    assert [resumed(before, after).schedule(step) for step in range(20)] == want


def test_custom_schedule_is_kept(tmp_path):
    before, after = made("pretrain", tmp_path, 4), made("pretrain", tmp_path, 2)
    own = PretrainTrainer(after.cfg, schedule=lambda step: 1 / (1 + step))
    before.steps_done = 2
    assert resumed(before, own).schedule(2) == 1 / 3


# ---- what is printed

def tune(stop=None, epochs=2, file="rows.jsonl", scheduler=None, seed=42, data=None, resume="latest",
         **hyper):
    "Fine-tune on 22 rows; `stop`: interrupt after that step."
    def at(trainer, metrics):
        if metrics["step"] == stop: trainer.stop_requested = True
    cfg = SFTConfig.model_validate_json(
        json.dumps(
            {
                "name": "run",
                "data": {"input_file": file, **(data or {})},
                "model": MODEL,
                "system": {"seed": seed},
                "training": {
                    "epochs": epochs,
                    "hyperparameters": {"batch_size": 4, "learning_rate": 1e-3, **hyper},
                    "scheduler": scheduler or {},
                },
                "logging": {"steps": {"logging_interval": 1}},
                "resume": {"checkpoint": resume},
            }
        )
    )
    if stop is None: return sft(cfg)
    with pytest.raises(KeyboardInterrupt): sft(cfg, callbacks=[at])
    return Path("runs/run")


@pytest.fixture(scope="module")
def began(tmp_path_factory):
    "A folder with a run that was stopped after step 3, and files that it may resume with."
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, rows in {"rows": ANSWERS, "more": ANSWERS + ANSWERS[:8], "shuffled": ANSWERS[::-1],
                           "fewer": ANSWERS[:9],
                           "copy": ANSWERS}.items(): write(f"{name}.jsonl", rows)
        tune(stop=3, resume=None)
    return folder


@pytest.fixture
def stopped(began, tmp_path, monkeypatch):
    "A copy of it, to be resumed here."
    shutil.copytree(began, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")


def test_consequences_of_another_batch_size_are_printed(stopped, capsys, counted):
    path = tune(batch_size=8, gradient_accumulation_steps=2)
    output = capsys.readouterr().out
    assert (
        "batch_size 4 → 8; gradient_accumulation_steps 1 → 2: 10 rows left in epoch 1; "
        "3 steps to go instead of 9.\n"
        in output
    )
    assert "3 steps to go of 6: 2 epochs." in output
    assert (
        "the learning rate of the next step is " in output
        and "the remaining 3 steps are the last of a schedule of 4." in output
    )
    assert "10 rows left in epoch 1" in (path / "logs" / "log.txt").read_text()
    assert [row["step"] for row in read_metrics(path) if "loss" in row] == [1, 2, 3, 4, 5, 6]


def test_panel_resumes_by_rows_too(stopped, capsys, counted):
    cfg = load_config(SFTConfig, "runs/run/config.yaml", {"training.hyperparameters.batch_size": 8,
                                                          "resume.checkpoint": "latest"})
    live = Live(SFTTrainer(cfg))
    live.run()
    assert (
        "batch_size 4 → 8: 10 rows left in epoch 1; 5 steps to go instead of 9."
        in capsys.readouterr().out
    )
    assert (live.trainer.steps_done,
            live.panel.bar.max) == (8, 8) and sorted(counted.values()) == [1] * 12 + [2] * 10


def test_unchanged_settings_print_nothing(stopped, capsys):
    tune()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Resuming from") and "parameters" in lines[1]


@pytest.mark.parametrize("change, part", [
    ({"epochs": 3}, "epochs 2 → 3: 10 rows left in epoch 1; 15 steps to go instead of 9."),
    ({"iters": 5}, "iters not set → 5: 10 rows left in epoch 1; 2 steps to go instead of 9."),
    ({"learning_rate": 2e-3},
     "training.hyperparameters.learning_rate: 0.001 → 0.002: the learning rate of the next step is "),
    ({"scheduler": {"warmup_steps": 6, "type": "cosine_with_warmup"}},
     "training.scheduler.warmup_steps: null → 6"),
    ({"seed": 7}, "seed 42 → 7: the remaining rows are shuffled with the new seed"),
    ({"file": "more.jsonl"},
     'input_file: "rows.jsonl" → "more.jsonl": epoch 1 restarts with 30 rows; 16 steps to go instead of 9.'),
    ({"file": "shuffled.jsonl"}, "epoch 1 restarts with 22 rows; 12 steps to go instead of 9."),
    ({"file": "fewer.jsonl"}, "epoch 1 restarts with 9 rows; 6 steps to go instead of 9."),
    ({"file": "copy.jsonl"},
     'data.input_file: "rows.jsonl" → "copy.jsonl": the rows are the same as before, in the same order.'),
    ({"data": {"mask_prompt": False}}, "data.mask_prompt: true → false: epoch 1 restarts with 22 rows"),
])
def test_each_consequence_is_printed(stopped, capsys, change, part):
    path = tune(**change)
    [line] = [line for line in capsys.readouterr().out.splitlines() if part in line]
    assert line.endswith(".") and line in (path / "logs" / "log.txt").read_text()


def test_raised_epochs_of_a_finished_run(stopped, capsys, counted):
    tune(epochs=1)
    counted.clear(); capsys.readouterr()
    tune(epochs=1)
    finished = 'Run already completed (6 steps); to train longer, raise "training.epochs".'
    assert finished in capsys.readouterr().out and not counted
    path = tune(epochs=3)
    assert "22 rows left in epoch 2; 12 steps to go instead of 0." in capsys.readouterr().out
    assert (
        read_metadata(path)["outcome"] == "finished"
        and [r["step"] for r in read_metrics(path) if "loss" in r][-1] == 18
    )


def test_fewer_epochs_than_were_trained(stopped):
    tune(stop=8)
    with pytest.raises(RunError) as e: tune(epochs=1)
    check_sentence(str(e.value), "has seen 1.", '"training.epochs" is 1', "set it to 2")


def test_checkpoint_without_a_sampler(stopped, capsys, counted, caplog, tmp_path):
    "Earlier versions stored none; it follows from the run's configuration."
    for step in Path("runs/run/checkpoints").glob("step_*"):
        arrays, state = load_checkpoint(step)
        shutil.rmtree(step)
        state = {key: value for key, value in state.items() if key not in ("sampler", "ahead")}
        write_checkpoint(step.parent, state.pop("step"), arrays, state)
    shutil.copytree("runs/run", "kept")
    capsys.readouterr()
    tune(batch_size=8)
    assert (
        "batch_size 4 → 8: 10 rows left in epoch 1; 5 steps to go instead of 9."
        in capsys.readouterr().out
    )
    caplog.clear()
    shutil.rmtree("runs/run"); shutil.move("kept", "runs/run"); Path("runs/run/config.yaml").unlink()
    with caplog.at_level(logging.WARNING): tune(batch_size=8)
    [text] = [r.message for r in caplog.records if "do not record" in r.message]
    assert "do not record the batch size" in text and "for batches of 8" in text
