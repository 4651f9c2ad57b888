"""Faults at random moments: every stage, run by its command, is killed, interrupted, out of disk space or
finds damaged files. It must end with a one-line error, and resume to the same bits as an undisturbed run."""
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import mlx_pretrain  # noqa: F401, I001 (before MLX)

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_pretrain.checkpoint import load_checkpoint
from mlx_pretrain.config import ConfigError, UserError, load_config, to_yaml
from mlx_pretrain.data import cached_windows, read_texts
from mlx_pretrain.lora import load_adapters
from mlx_pretrain.model import ScalarLlama
from mlx_pretrain.ppo import PPOConfig
from mlx_pretrain.pretrain import PretrainConfig
from mlx_pretrain.pretrained import load
from mlx_pretrain.prompt import PromptFormat
from mlx_pretrain.reward import RewardConfig
from mlx_pretrain.rows import read_examples
from mlx_pretrain.run import checkpoints, latest_checkpoint, read_metrics
from mlx_pretrain.sft import SFTConfig
from mlx_pretrain.tokenizer import ByteTokenizer

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [{"text": f"{i} bottles of beer on the wall"} for i in range(10, 90)]
ASKED = [{"prompt": f"{i} plus {i}", "response": f"{2 * i}"} for i in range(40)]
PAIRS = [{"prompt": f"{i} plus {i}", "chosen": f"{2 * i}", "rejected": "no"} for i in range(40)]
REWARD = "def reward(prompt, response): return sum(map(ord, response)) % 97 / 97\n"
SMALL = {"dimensions": {"hidden_size": 16, "intermediate_size": 32, "num_layers": 1},
         "attention": {"num_heads": 2}}


def stage(file, iters, interval, data=None, training=None, **more):
    "A configuration that logs every step, and saves often."
    return {
        "name": "r",
        "data": {"input_file": file, "validation_file": file, **(data or {})},
        "training": {
            "hyperparameters": {"batch_size": 4, "iters": iters, "learning_rate": 1e-3},
            **(training or {}),
        },
        "logging": {
            "keep_last": 2,
            "steps": {"logging_interval": 1, "validation_interval": 7, "checkpoint_interval": interval},
        },
        **more,
    }


BASE = {"pretrained_model": "runs/base"}
STAGES = {  # name → command and configuration
    "pretrain": (
        "train",
        stage("texts.jsonl", 150, 4, {"preprocessing": {"max_context_size": 32}}, model=SMALL),
    ),
    "lora": ("sft", stage("asked.jsonl", 100, 4, training={"lora": {"rank": 2, "dropout": 0.1}}, **BASE)),
    "reward": (
        "reward",
        stage("pairs.jsonl", 80, 4, {"response_length": 8, "normalization_samples": 8}, **BASE),
    ),
    "ppo": (
        "rl",
        stage(
            "asked.jsonl",
            12,
            2,
            {"response_length": 4, "ppo_mini_batch_size": 2},
            **BASE,
            reward_model="reward.py:reward",
        ),
    ),
}
EACH = pytest.mark.parametrize("name", STAGES)


class Place:
    "A working directory of one stage, with its own token cache."
    def __init__(self, path, name):
        self.path, self.run, self.command = path, path / "runs" / "r", STAGES[name][0]

    def start(self, **how):
        "Start or resume."
        words = [sys.executable, "-m", "mlx_pretrain", self.command, "--config", "cfg.yaml",
                 "--resume.checkpoint", "latest"]
        env = {**os.environ, "PYTHONPATH": f"{self.path}:{ROOT}",
               "MLX_PRETRAIN_CACHE": str(self.path / "cache"), **how.pop("env", {})}
        return subprocess.Popen(words, cwd=self.path, env=env, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True, **how)

    def begun(self, process):
        "Wait until it has written metrics into its run directory, hidden or not."
        def written():
            return {str(file): file.exists() and file.stat().st_mtime_ns
                    for file in self.path.glob("runs/*r*/metrics.jsonl")}
        before = written()
        while process.poll() is None and written() == before: time.sleep(0.005)

    def finish(self, process):
        "Its output until it ends, which must not be a traceback, or a failure without a message."
        output, _ = process.communicate(timeout=120)
        assert "Traceback" not in output and process.returncode in (0, 2, 129, 130, 143, -signal.SIGKILL), (
            process.returncode,
            output[-2000:],
        )
        if process.returncode == 2: assert "\nmlx-pretrain: " in f"\n{output}", output[-500:]
        return output

    def whole(self):
        "Run to the end, from wherever it is."
        process = self.start()
        output = self.finish(process)
        assert process.returncode == 0, output[-2000:]

    def end(self):
        "The last checkpoint, the metrics without the speed, and the model."
        arrays, state = load_checkpoint(checkpoints(self.run)[-1])
        state["base"] = {key: value for key, value in (state["base"] or {}).items() if key != "path"}
        logged = read_metrics(self.run) if (self.run / "metrics.jsonl").exists() else []
        rows = [row for row in logged if row.get("event") != "resume"]
        lines = [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]
        return {**dict(tree_flatten(arrays)),
                **mx.load(str(self.run / "model" / "model.safetensors"))}, state, lines


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    "Data, a reward and a base model; each test works in a copy."
    home = tmp_path_factory.mktemp("world")
    for file, rows in (("texts", TEXTS), ("asked", ASKED), ("pairs", PAIRS)):
        (home / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "reward.py").write_text(REWARD)
    (home / "cfg.yaml").write_text(json.dumps({**STAGES["pretrain"][1], "name": "base"}))
    Place(home, "pretrain").whole()
    return home


@pytest.fixture(scope="session")
def reference(world, tmp_path_factory):
    "Each stage undisturbed, run on first use: its end, its directory, and its seconds after the first step."
    made = {}
    def of(name):
        if name not in made:
            place = copy(world, tmp_path_factory.mktemp("reference") / name, name)
            process = place.start()
            place.begun(process)
            begun = time.monotonic()
            place.finish(process)
            made[name] = place.end(), place, time.monotonic() - begun
        return made[name]
    return of


def copy(world, path, name):
    place = Place(Path(shutil.copytree(world, path)), name)
    (place.path / "cfg.yaml").write_text(json.dumps(STAGES[name][1]))
    return place


def check(place, wanted, metrics=True):
    "Resume to the end: the same names, bits, state and, unless they were deleted, metrics."
    place.whole()
    (arrays, state, lines), (wanted_arrays, wanted_state, wanted_lines) = place.end(), wanted
    assert arrays.keys() == wanted_arrays.keys() and all(mx.array_equal(a, wanted_arrays[key]).item()
                                                         for key, a in arrays.items())
    assert state == wanted_state and (not metrics or lines == wanted_lines)
    assert not [path for path in (place.path / "runs").rglob(".*")
                if path.name.startswith(".r")], "leftover files"


@EACH
def test_kill(name, number, world, reference, rng, tmp_path):
    wanted, _, seconds = reference(name)
    place = copy(world, tmp_path / "w", name)
    for _ in range(2):
        process = place.start()
        place.begun(process)
        time.sleep(rng.uniform(0, seconds / 3))
        process.kill()
        place.finish(process)
        if (place.run / "checkpoints").exists(): latest_checkpoint(place.run)
    check(place, wanted)


@EACH
def test_signal(name, number, world, reference, rng, tmp_path):
    wanted, _, seconds = reference(name)
    place = copy(world, tmp_path / "w", name)
    process = place.start()
    place.begun(process)
    time.sleep(rng.uniform(0, seconds))
    process.send_signal(rng.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP]))
    place.finish(process)
    check(place, wanted)


@EACH
def test_full_disk(name, number, world, reference, rng, tmp_path):
    "Limit the size of files, as on a full disk or with a quota."
    wanted, size = reference(name)[0], int(10 ** rng.uniform(1, 5))
    place = copy(world, tmp_path / "w", name)
    place.finish(place.start(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))))
    check(place, wanted)


@pytest.mark.parametrize("what", ["the run", "runs", "checkpoints", "metrics", "a file for the run"])
def test_deleted(what, number, world, reference, rng, tmp_path):
    wanted, _, seconds = reference("pretrain")
    place = copy(world, tmp_path / "w", "pretrain")
    process = place.start()
    place.begun(process)
    time.sleep(rng.uniform(0, seconds))
    target = {"the run": place.run, "runs": place.path / "runs", "checkpoints": place.run / "checkpoints",
              "metrics": place.run / "metrics.jsonl"}.get(what, place.run)
    try: os.rename(target, tmp_path / "gone")
    except OSError: pass                                                  # it is not there yet
    else:
        if what == "a file for the run": target.write_text("")
    place.finish(process)
    if place.run.is_file(): place.run.unlink()
    if (place.run / "model").is_dir() and not checkpoints(place.run):  # it had finished: nothing to resume
        again = place.start()
        output = place.finish(again)
        assert again.returncode == 2 and "exists already" in output and "`resume.checkpoint" not in output
        return
    check(place, wanted, metrics=False)  # the trainer's state is saved again, without the history


def test_two_writers(number, world, reference, rng, tmp_path):
    place = copy(world, tmp_path / "w", "pretrain")
    one = place.start()
    time.sleep(rng.uniform(0, 3))
    output = place.finish(place.start())
    place.finish(one)
    expected = ("already completed", "is writing", "Resuming")
    assert one.returncode == 2 or any(text in output for text in expected), output
    check(place, reference("pretrain")[0])


BACKWARDS = (
    "import time\nt = time.time()\ndef back():\n    global t\n    t -= 60\n    return t\ntime.time = back\n"
)


@pytest.mark.parametrize("how",
                         ["umask", "symlinked runs", "symlinked run", "clock backwards", "runs is a file",
                          "cache is a file"])
def test_odd_places(how, world, reference, tmp_path):
    place, more, runs = copy(world, tmp_path / "w", "pretrain"), {}, tmp_path / "w" / "runs"
    refused = how in ("symlinked run", "runs is a file", "cache is a file")
    if how == "umask": more["umask"] = 0o077
    if how == "clock backwards": (place.path / "sitecustomize.py").write_text(BACKWARDS)
    if how == "symlinked run": place.run.symlink_to(tmp_path)
    if how in ("symlinked runs", "runs is a file"): runs.rename(tmp_path / "there")
    if how == "symlinked runs": runs.symlink_to(tmp_path / "there")
    if how == "runs is a file": runs.write_text("")
    if how == "cache is a file": shutil.rmtree(place.path / "cache"); (place.path / "cache").write_text("")
    process = place.start(**more)
    output = place.finish(process)
    assert process.returncode == (2 if refused else 0), output[-2000:]
    if how == "symlinked run": place.run.unlink()
    if how == "runs is a file": runs.unlink()
    if how == "cache is a file": (place.path / "cache").unlink()
    check(place, reference("pretrain")[0])


PIECES = (b"{", b"}", b'"', b"[", b": ", b"\n", b"\0", b"NaN", b"1e999", b"- ", b"null", b"\xff", b"&a ",
          b"*a", b"!!python/name:os ")


def cut(data, rng):
    "Some bytes changed, removed, duplicated, or moved."
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        b = min(b, a + rng.choice((1, 1, 2, 8, 40)))
        what = rng.randrange(5)
        if what == 0: data[a:b] = bytes(rng.randrange(256) for _ in range(b - a))
        elif what == 1: del data[a:b]
        elif what == 2: data[a:a] = data[a:b]
        elif what == 3: data[a:b] = rng.choice(PIECES)
        else: data = data[:b] + data[a:b] + data[b:]
    return bytes(data)


def test_mutated_yaml(number, rng, tmp_path):
    "A damaged configuration raises nothing but `ConfigError`."
    file, refused = tmp_path / "c.yaml", 0
    classes = {"train": PretrainConfig, "sft": SFTConfig, "reward": RewardConfig, "rl": PPOConfig}
    for command, config in STAGES.values():
        text = to_yaml(classes[command].model_validate_json(json.dumps(config))).encode()
        for _ in range(250):
            file.write_bytes(cut(text, rng))
            try: load_config(classes[command], file)
            except ConfigError: refused += 1
    assert 400 < refused < 1000


def test_mutated_jsonl(number, rng, tmp_path):
    "Damaged data raise nothing but `UserError`."
    file = tmp_path / "d.jsonl"
    fmt = PromptFormat(prompt_format="{instruction}", input_field="prompt", output_field="response")
    refused = 0
    texts, asked = ("".join(json.dumps(row) + "\n" for row in rows[:8]).encode() for rows in (TEXTS, ASKED))
    for _ in range(500):
        for content, read in (
            (texts, lambda: [*read_texts(file)]),
            (asked, lambda: read_examples(file, ByteTokenizer(), fmt, 64)),
        ):
            file.write_bytes(cut(content, rng))
            try: read()
            except UserError: refused += 1
    assert refused > 300


def flip(file, rng):
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


@pytest.mark.parametrize("name", ["lora", "reward"])
def test_flipped_bits(name, number, reference, rng, tmp_path, caplog, monkeypatch):
    "One flipped bit anywhere in a run: an error, a warning, or no effect."
    kind = {"kind": ScalarLlama} if name == "reward" else {}
    _, place, _ = reference(name)
    run = Path(shutil.copytree(place.run, tmp_path / "runs" / "r"))
    monkeypatch.chdir(place.path)
    base = load("runs/base").model
    opened = [(run / "model", lambda: load(run / "model", **kind))]
    opened += [(saved, lambda saved=saved: load_checkpoint(saved)) for saved in checkpoints(run)]
    if name == "lora": opened.append((run / "adapters", lambda: load_adapters(base, run / "adapters")))
    caplog.set_level(logging.WARNING)
    for folder, read in opened:
        for file in folder.iterdir():
            for _ in range(5):
                kept = file.read_bytes()
                flip(file, rng)
                caplog.clear()
                try: read()
                except UserError: pass
                else: assert "changed since the export" in caplog.text, file
                file.write_bytes(kept)


def test_flipped_cache(number, rng, tmp_path):
    file = tmp_path / "d.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in TEXTS))
    def open_it(): return cached_windows(file, ByteTokenizer(), 32, cache=tmp_path / "cache")
    folder = open_it().tokens.folder
    whole = (folder / "tokens.bin").read_bytes()
    for _ in range(40):
        damaged = folder / rng.choice(["tokens.bin", "meta.json"])
        if rng.random() < 0.5: flip(damaged, rng)
        else: os.truncate(damaged, rng.randrange(damaged.stat().st_size))
        assert open_it().tokens[:].tobytes() == whole


@pytest.mark.parametrize("how", ["cut off", "deleted", "made again"])
def test_cache_under_a_training(how, number, world, reference, rng, tmp_path):
    wanted, _, seconds = reference("pretrain")
    place = copy(world, tmp_path / "w", "pretrain")
    process = place.start()
    place.begun(process)
    time.sleep(rng.uniform(0, seconds))
    [tokens] = (place.path / "cache").glob("[!.]*/tokens.bin")
    if how == "cut off": os.truncate(tokens, rng.randrange(tokens.stat().st_size))
    else: shutil.rmtree(tokens.parent)
    if how == "made again":
        cached_windows(place.path / "texts.jsonl", ByteTokenizer(), 8, cache=place.path / "cache")
    output = place.finish(process)
    refused = how == "cut off" and "was cut off while it was in use" in output
    assert process.returncode == 0 or refused, output[-1000:]
    check(place, wanted)
