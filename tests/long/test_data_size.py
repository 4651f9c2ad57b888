"""A gigabyte of text becomes tokens and batches in less than 500 MB of memory."""
import json
import random
import subprocess
import sys

import pytest

BUDGET = 500 # MB, the whole process
GIGABYTE = 1_000_000_000
SYLLABLES = [a + b for a in ("b", "c", "f", "g", "gr", "l", "m", "n", "r", "st", "t", "é", "ł")
             for b in "aeiou"] + ["ing", "ed", "ion"]

# Runs in a new process. VmHWM is the peak memory of this program; ru_maxrss would include the size of the
# process that started it.
WORKER = """
import json, resource, sys, time
from dataclasses import replace
from itertools import islice
import mlx_pretrain
import numpy as np
from mlx_pretrain.data import batch_indices, cached_windows, pack, read_texts
from mlx_pretrain.tokenizer import ByteTokenizer, load_tokenizer, train_sentencepiece

def peak():
    if sys.platform != "linux": return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1e3

def draw(windows, steps=2000):
    for step in range(steps): windows.batch(batch_indices(len(windows), 8, step, seed=0))

started = time.perf_counter()
{work}
print(json.dumps({{"peak": peak(), "seconds": time.perf_counter() - started, "tokens": len(windows.tokens),
                  **windows.source}}))
"""


def measure(work, *args):
    "Run code in a new process; its memory use and output."
    done = subprocess.run([sys.executable, "-c", WORKER.format(work=work), *map(str, args)],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def write_rows(path, size):
    "A JSON Lines file of `size` bytes: ten times the same rows of random words, up to 6 and 10 MB long."
    rng, rows, n_bytes, written = random.Random(0), [], 0, 0
    words = ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 4))) for _ in range(20_000)]
    text = "".join(rng.choice(words) + rng.choices([" ", ", ", ".\n", ' "', " 🙂 "], [80, 8, 8, 3, 1])[0]
                   for _ in range(1_800_000))
    while written < size / 10:
        length = {30: 5_000_000, 60: 7_500_000}.get(len(rows)) or rng.choice((80, 800, 4000, 30_000))
        start = rng.randrange(len(text) - length)
        part = text[start:start + length]
        rows.append(json.dumps({"id": len(rows), "text": part},
                               ensure_ascii=len(rows) % 2 == 0).encode() + b"\n")
        n_bytes, written = n_bytes + len(part.encode()), written + len(rows[-1])
    with open(path, "wb") as file:
        for _ in range(10): file.writelines(rows)
    return 10 * len(rows), 10 * n_bytes


@pytest.fixture(scope="module")
def gigabyte(tmp_path_factory):
    "The file, what is in it, and a place for the cache; all deleted at the end."
    home = tmp_path_factory.mktemp("gigabyte")
    yield home / "big.jsonl", *write_rows(home / "big.jsonl", GIGABYTE), home / "cache"
    for path in sorted(home.rglob("*"), reverse=True): path.rmdir() if path.is_dir() else path.unlink()


def test_byte_tokens_of_a_gigabyte(gigabyte):
    path, documents, n_bytes, cache = gigabyte
    used = measure(
        "windows = cached_windows(sys.argv[1], ByteTokenizer(), 1024, 64, cache=sys.argv[2]); draw(windows)",
        path,
        cache,
    )
    print(used)
    assert used["tokens"] == n_bytes + 2 * documents and used["documents"] == documents
    assert path.stat().st_size >= GIGABYTE and used["peak"] < BUDGET


def test_batches_use_constant_memory(gigabyte):
    "2,000 batches from a finished cache; a memory-mapped reader, as a control, exceeds the budget."
    path, *_, cache = gigabyte
    draw = (
        "windows = cached_windows(sys.argv[1], ByteTokenizer(), 1024, 64, cache=sys.argv[2]); draw(windows)"
    )
    assert measure(draw, path, cache)["peak"] < BUDGET / 2
    mapped = (
        "windows = replace(windows, tokens=np.memmap(windows.tokens.folder / 'tokens.bin', np.uint16, 'r'))"
    )
    assert measure(draw.replace("; draw", f"; {mapped}; draw"), path, cache)["peak"] > BUDGET


def test_pack_of_a_quarter_exceeds_the_budget(gigabyte):
    "Negative control: the measure sees what `pack` needs."
    path, documents, *_ = gigabyte
    used = measure("windows = pack(islice(read_texts(sys.argv[1]), int(sys.argv[2])), ByteTokenizer(), 1024)",
                   path, documents // 4)
    assert used["peak"] > BUDGET


def test_sentencepiece_on_a_twentieth(tmp_path):
    "SentencePiece takes ten times as long as bytes, so a twentieth of the text must do."
    path, spm, cache = tmp_path / "part.jsonl", tmp_path / "spm", tmp_path / "cache"
    documents, _ = write_rows(path, GIGABYTE // 20)
    train = (
        "tok = train_sentencepiece(read_texts(sys.argv[1]), 4096, sys.argv[2]); windows = pack(['a'], tok, 8)"
    )
    used = measure(train, path, spm)
    assert used["peak"] < BUDGET
    used = measure(
        "windows = cached_windows(sys.argv[1], load_tokenizer(sys.argv[2]), 1024, 64, cache=sys.argv[3]); "
        "draw(windows)",
        path,
        spm,
        cache,
    )
    assert used["documents"] == documents and used["tokens"] > 10_000_000 and used["peak"] < BUDGET
    path.unlink()
