"""Properties of mlx_pretrain.data: nothing is lost, doubled or reordered, and planted bugs are caught."""
import fcntl
import gc
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest
from common import KINDS, TEXT, check_sentence, forall, saved, tokenizer, write_documents
from hypothesis import strategies as st

from mlx_pretrain import data, jsonl, token_cache, tokenizer as tokenizers
from mlx_pretrain.config import ConfigError, DataError, load_config
from mlx_pretrain.data import (
    DataConfig, Windows, batch_indices, cached_windows, make_tokenizer, num_steps, pack, read_texts)
from mlx_pretrain.jsonl import read_jsonl
from mlx_pretrain.token_cache import cache_dir
from mlx_pretrain.tokenizer import ByteTokenizer, SpecialTokens, load_tokenizer
from mlx_pretrain.user_code import load_object


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    "Nothing lands in the home directory."
    monkeypatch.setenv("MLX_PRETRAIN_CACHE", str(tmp_path_factory.mktemp("cache")))


# Batches ------------------------------------------------------------------------------------------

def check_epochs(n, batch_size, epochs, seed, batches=batch_indices):
    "Every window once per epoch, one epoch after the other, empty places only at the very end."
    steps = num_steps(n, batch_size, epochs)
    visited = np.concatenate([batches(n, batch_size, step, seed, epochs) for step in range(steps)])
    assert visited.shape == (steps * batch_size,)
    assert len(visited) - n * epochs < batch_size
    for epoch in range(epochs): assert sorted(visited[epoch * n:(epoch + 1) * n].tolist()) == list(range(n))
    assert (visited[n * epochs:] == -1).all()


COUNTS = dict(n=st.integers(1, 40), batch_size=st.integers(1, 50), epochs=st.integers(1, 5),
              seed=st.integers(0, 2**32))


@forall(**COUNTS)
def test_each_epoch_visits_every_window_once(n, batch_size, epochs, seed):
    check_epochs(n, batch_size, epochs, seed)


@forall(**COUNTS)
def test_batch_depends_only_on_seed_and_step(n, batch_size, epochs, seed):
    data._order.cache_clear()
    backwards = [batch_indices(n, batch_size, step, seed)
                 for step in reversed(range(num_steps(n, batch_size, epochs)))][::-1]
    data._order.cache_clear()
    for step, expected in enumerate(backwards):
        limited = batch_indices(n, batch_size, step, seed, epochs)
        assert np.array_equal(batch_indices(n, batch_size, step, seed), expected)
        assert np.array_equal(limited[limited >= 0], expected[limited >= 0])
    with pytest.raises(ValueError, match="is after the end"):
        batch_indices(n, batch_size, len(backwards), seed, epochs)


def test_epochs_and_seeds_have_different_orders():
    orders = [tuple(batch_indices(30, 30, step, seed)) for step in range(4) for seed in range(4)]
    assert len(set(orders)) == 16


def drop_last(n, batch_size, step, seed, epochs):
    "Planted bug: a batch that straddles two epochs is dropped."
    got = batch_indices(n, batch_size, step, seed, epochs)
    return np.full_like(got,
                        -1) if (step * batch_size) // n != (step * batch_size + batch_size - 1) // n else got


def sample_with_replacement(n, batch_size, step, seed, epochs):
    return np.random.default_rng([seed, step]).integers(0, n, batch_size)


def reshuffle_each_step(n, batch_size, step, seed, epochs):
    "Planted bug: the order depends on the step and not on the epoch."
    places = step * batch_size + np.arange(batch_size)
    order = np.random.default_rng([seed, step]).permutation(n)
    return np.where(places < n * epochs, order[places % n], -1)


@pytest.mark.parametrize("bug", [drop_last, sample_with_replacement, reshuffle_each_step])
def test_planted_batch_bugs_are_detected(bug):
    with pytest.raises(AssertionError): check_epochs(10, 4, 3, 0, bug)


# Windows ------------------------------------------------------------------------------------------

def check_windows(windows, documents, tok):
    "Every token but the first is a target once, in order, with its predecessor as input."
    stream = [i for document in documents for i in [tok.bos_id, *tok.encode(document), tok.eos_id]]
    inputs, targets, mask = (np.array(a) for a in windows.batch(np.arange(len(windows))))
    assert inputs.shape == targets.shape == mask.shape == (len(windows), windows.context)
    assert mask.dtype == bool and inputs.dtype == targets.dtype == np.int32
    assert targets[mask].tolist() == stream[1:]
    assert inputs[mask].tolist() == stream[:-1]
    assert windows.n_targets == mask.sum() == len(stream) - 1
    assert mask.any(axis=1).all()                                                # no window for nothing
    assert (inputs[:, 1:] == targets[:, :-1]).all()  # targets are the inputs moved by one
    kept = targets[:-1] if len(windows) > 1 else targets[:0]
    assert not (kept == tok.pad_id).any()  # padding in the last window only
    assert Counter(targets[mask].tolist())[tok.eos_id] == len(documents)
    assert Counter(targets[mask].tolist())[tok.bos_id] == len(documents) - 1
    full = stream.index(tok.eos_id) + 1
    assert inputs[0][:min(full, windows.context)].tolist() == stream[:min(full, windows.context)]
    assert windows.n_bytes == sum(len(d.encode()) for d in documents)


PACKED = dict(
    documents=st.lists(TEXT, min_size=1, max_size=6).filter(lambda ds: any(ds)),
    shape=st.integers(1, 24).flatmap(
        lambda context: st.tuples(st.just(context), st.integers(0, context - 1))
    ),
)


@KINDS
@forall(**PACKED)
def test_every_token_is_a_target_exactly_once(kind, documents, shape):
    context, overlap = shape
    tok = tokenizer(kind)
    check_windows(pack(iter(documents), tok, context, overlap), documents, tok)


@forall(**PACKED)
def test_overlap_repeats_the_previous_window(documents, shape):
    context, overlap = shape
    windows = pack(documents, ByteTokenizer(), context, overlap)
    inputs, _, mask = (np.array(a) for a in windows.batch(range(len(windows))))
    for before, after in zip(inputs[:-1], inputs[1:], strict=True):
        assert before[context - overlap:].tolist() == after[:overlap].tolist()
    assert not mask[1:, :overlap].any()


@forall(**PACKED, order=st.randoms())
def test_window_is_the_same_in_any_batch(documents, shape, order):
    windows = pack(documents, ByteTokenizer(), *shape)
    indices = [*range(len(windows)), -1]
    order.shuffle(indices)
    together = windows.batch(indices)
    for row, i in enumerate(indices):
        alone = windows.batch([i])
        for a, b in zip(alone, together, strict=True): assert a[0].tolist() == b[row].tolist()
        if i == -1: assert not alone.loss_mask.any() and (np.array(alone.inputs) == windows.pad_id).all()


class DropsTail(Windows):
    "Planted bug: the last, partly filled window is lost."
    def __len__(self): return max(1, (len(self.tokens) - 1) // self.context)


class CountsOverlap(Windows):
    "Planted bug: overlap tokens count twice."
    def batch(self, indices):
        inputs, targets, mask = super().batch(indices)
        return data.Batch(inputs, targets, (targets != self.pad_id))


class SkipsAtCuts(Windows):
    "Planted bug: the first target of each window is lost (inputs and targets cut from the same T tokens)."
    def batch(self, indices):
        inputs, targets, mask = super().batch(indices)
        mask = np.array(mask)
        mask[1:, 0] = False
        return data.Batch(inputs, targets, data.mx.array(mask))


@pytest.mark.parametrize(("bug", "overlap"), [(DropsTail, 0), (CountsOverlap, 3), (SkipsAtCuts, 0)])
def test_planted_window_bugs_are_detected(bug, overlap):
    documents, tok = ["one two three", "four five"], ByteTokenizer()
    good = pack(documents, tok, 8, overlap)
    check_windows(good, documents, tok)
    with pytest.raises(AssertionError): check_windows(bug(**vars(good)), documents, tok)


@pytest.mark.parametrize("change", [
    lambda t, tok: t[t != tok.eos_id],                                     # documents that never end
    lambda t, tok: np.insert(t, 5, tok.eos_id),                            # an end inside a document
    lambda t, tok: np.delete(t, len(t) // 2),                              # a lost token
    lambda t, tok: t[::-1].copy(),                                         # another order
])
def test_planted_stream_bugs_are_detected(change):
    documents, tok = ["one two three", "four five"], ByteTokenizer()
    good = pack(documents, tok, 8)
    with pytest.raises(AssertionError):
        check_windows(replace(good, tokens=change(good.tokens, tok)), documents, tok)


def test_invalid_token_ids_raise():
    class Broken(ByteTokenizer):
        bad = 259
        def _encode_batch(self, texts): return [[self.bad] for _ in texts]
    with pytest.raises(DataError, match="made id 259, but has only 259 tokens"): pack(["a"], Broken(), 4)
    Broken.bad = -1
    with pytest.raises(DataError, match="made id -1"): pack(["a"], Broken(), 4)
    windows = pack(["abc"], ByteTokenizer(), 4)
    for index in (len(windows), -2):
        with pytest.raises(IndexError): windows.batch([index])


def test_tokens_do_not_depend_on_group_size(monkeypatch):
    documents = [f"document {i} " * (i % 4) for i in range(30)]
    whole = pack(documents, tokenizer("sentencepiece"), 16, 4)
    groups = token_cache.group_by_size
    monkeypatch.setattr(token_cache, "group_by_size",
                        lambda texts, **length: groups(texts, size=20, **length))
    assert np.array_equal(pack(documents, tokenizer("sentencepiece"), 16, 4).tokens, whole.tokens)


# JSON Lines ---------------------------------------------------------------------------------------

@forall(texts=st.lists(TEXT, min_size=1, max_size=6), ascii=st.booleans(),
        end=st.sampled_from(["\n", "\r\n", "\n\n"]), last=st.booleans())
def test_jsonl_roundtrip(texts, ascii, end, last):
    file = f"{mkdtemp()}/rows.jsonl"
    content = end.join(json.dumps({"text": t, "id": i}, ensure_ascii=ascii)
                       for i, t in enumerate(texts)) + (end if last else "")
    with open(file, "wb") as f: f.write(content.encode())
    rows = list(read_jsonl(file))
    assert [row.value for row in rows] == [{"text": t, "id": i} for i, t in enumerate(texts)]
    assert list(read_texts(file)) == texts
    assert [row.line for row in rows] == [1 + i * end.count("\n") for i in range(len(texts))]


@pytest.mark.parametrize(("line", "message"), [
    (b'{"text": "a"', "not valid JSON"),
    (b"{text: 1}", "not valid JSON"),
    (b'{"text": "a"} {"text": "b"}', "not valid JSON"),
    (b'{"text": "tab\there"}', "not valid JSON"),
    (b"{", "each line must hold one complete object"),
    (b'{"text": "a", "x": NaN}', "NaN is not a valid JSON number"),
    (b'{"x": -Infinity}', "-Infinity"),
    (b'{"x": 1e400}', "1e400"),
    (b'{"text": "a", "text": "a"}', 'duplicate key "text"'),
    (b'{"x": {"y": 1, "y": 2}}', 'duplicate key "y"'),
    (b'{"text": "\\ud83d"}', "unpaired surrogate"),
    (b'{"\\uDE00": 1}', "unpaired surrogate"),
    (b'{"text": "\xed\xa0\x80"}', "not UTF-8"),
    (b'{"text": "caf\xe9"}', "byte 0xe9 is not UTF-8"),
    (b'{"x": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "too deeply nested"),
    (b'{"x": 1' + b"0" * 6000 + b"}", "thousands of digits"),
    (b"[1]", "found a list"),
    (b'"text"', "found a string"),
    (b"null", "found null"),
    (b"3", "found a number"),
    (b"true", "found true"),
    (b'{"txt": "a"}', 'there is no field "text"; the row has "txt"'),
    (b"{}", "no field at all"),
    (b'{"text": null}', '"text" must be a string, found null'),
    (b'{"text": ["a"]}', "a list"),
    (b'{"text": 5}', "a number"),
])
def test_bad_line_error_names_file_and_line(tmp_path, line, message):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"text": "fine"}\n\n' + line + b'\n{"text": "fine"}\n')
    texts = read_texts(file)
    assert next(texts) == "fine"  # rows before it are read: it is a stream
    with pytest.raises(DataError) as error: next(texts)
    sentence = str(error.value)
    assert sentence.startswith(f"{file}, line 3: ") and message in sentence and "\n" not in sentence
    assert len(sentence) < 300 + len(str(file))


# Mistakes -----------------------------------------------------------------------------------------

def test_check_sentence_can_fail():
    for bad in (
        "no remedy",
        "two. Sentences; fix it",
        "two\nlines; fix it",
        "a remedy; perhaps",
        "ends with a full stop; fix it.",
    ):
        with pytest.raises(AssertionError): check_sentence(bad)
    with pytest.raises(AssertionError): check_sentence("fine; fix it", "line 3")


ROWS = {  # line 3 → part of the message
    "not JSON": (b"text: a", "not valid JSON"),
    "cut off": (b'{"text": "a', "each line must hold one complete object"),
    "two objects": (b'{"text": "a"}{"text": "b"}', "Extra data"),
    "trailing comma": (b'{"text": "a",}', "not valid JSON"),
    "NaN": (b'{"text": "a", "x": NaN}', "NaN is not a valid JSON number"),
    "Infinity": (b'{"x": Infinity}', "Infinity is not a valid"),
    "too large": (b'{"x": 1e999}', "1e999 is not a valid"),
    "long number": (b'{"x": -1' + b"0" * 5000 + b"}", "thousands of digits"),
    "long float": (b'{"x": 1' + b"0" * 5000 + b".5}", "is not a valid JSON number"),
    "key twice": (b'{"text": "a", "text": "b"}', 'duplicate key "text"'),
    "deep": (b'{"x":' * 100_000, "too deeply nested"),
    "unpaired surrogate": (b'{"text": "\\ud83d"}', "an unpaired surrogate"),
    "unpaired surrogate in a key": (b'{"\\udc00": "a"}', "an unpaired surrogate"),
    "encoded half": (b'{"text": "\xed\xa0\xbd"}', "byte 0xed is not UTF-8"),
    "Latin-1": (b'{"text": "\xe9"}', "byte 0xe9 is not UTF-8"),
    "zero bytes": (b"\0" * 40, "contains NUL bytes"),
    "a zero byte": (b'{"text": "a\0"}', "contains NUL bytes"),
    "control character": (b'{"text": "a\x1b"}', "Invalid control character"),
    "lone CR": (b'{"text": "a\rb"}', "Invalid control character"),
    "list": (b'["a"]', "found a list"),
    "number": (b"7", "found a number"),
    "text": (b'"a"', "found a string"),
    "null": (b"null", "found null"),
    "boolean": (b"false", "found true or false"),
    "no field": (b'{"txt": "a"}', 'there is no field "text"; the row has "txt"'),
    "empty object": (b"{}", "no field at all"),
    "null text": (b'{"text": null}', "found null"),
    "list of texts": (b'{"text": ["a"]}', "found a list"),
    "number as text": (b'{"text": 1.5}', "found a number"),
    "row too large": (b'{"text": "' + b"a" * 32_000_000 + b'"}', "longer than 32 MB"),
    "line break in a key": (b'{"a\\nb": 1}', 'the row has "a\\nb"'),
    "key twice, with a line break": (b'{"\\n": 1, "\\n": 2}', 'duplicate key "\\n"'),
    "long key": (b'{"' + b"k" * 10_000 + b'": 1}', "there is no field"),
    "byte order mark inside": (b'\xef\xbb\xbf{"text": "a"}', "not valid JSON"),
}


@pytest.mark.parametrize("reader", [
    lambda file: list(read_texts(file)), lambda file: cached_windows(file, ByteTokenizer(), 8),
    lambda file: cached_windows(file, tokenizer("sentencepiece"), 8, preprocess=lambda row: row)],
    ids=["read_texts", "cached", "preprocess"])
@pytest.mark.parametrize(("line", "says"), ROWS.values(), ids=ROWS)
def test_bad_row_error_is_one_sentence(tmp_path, line, says, reader):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"text": "fine"}\n\n' + line + b'\n{"text": "fine"}\n')
    with pytest.raises(DataError) as error: reader(file)
    check_sentence(str(error.value), f"{file}, line 3: ", says)
    assert list(cache_dir().glob("*")) == list(cache_dir().glob(".*")) == []  # nothing half-made stays behind


@contextmanager
def nobody():
    "A user who may not read what is not public; root may read all."
    if os.geteuid(): yield; return
    os.seteuid(65534)
    try: yield
    finally: os.seteuid(0)


def private(path):
    path.write_text('{"text": "a"}')
    path.chmod(0)
    return path


def fifo(path):
    os.mkfifo(path)
    return path


def written(path, content):
    path.write_bytes(content)
    return path


FILES = {  # makes the file → part of the message
    "empty": (lambda f: written(f, b""), "holds no rows"),
    "blank lines": (lambda f: written(f, b"\n \r\n\t\n"), "holds no rows"),
    "byte order mark only": (lambda f: written(f, b"\xef\xbb\xbf\n"), "holds no rows"),
    "no text": (lambda f: written(f, b'{"text": ""}\n' * 3), "no text"),
    "directory": (lambda f: f.mkdir() or f, "is a directory"),
    "missing": (lambda f: f, "cannot be read (No such file or directory)"),
    "fifo": (fifo, "is a pipe or a device"),
    "device": (lambda f: Path("/dev/zero"), "is a pipe or a device"),
    "unreadable": (private, "cannot be read (Permission denied)"),
    "below a file": (lambda f: written(f, b"") / "x", "(Not a directory)"),
    "zero in the name": (lambda f: f"{f}\0", "cannot be read"),
    "long name": (lambda f: Path(f"{f}{'x' * 300}"), "(File name too long)"),
    "gzip": (lambda f: written(f, b"\x1f\x8b\x08\0\0"), "is a gzip file"),
    "zstandard": (lambda f: written(f, b"(\xb5/\xfd\0"), "is a zstandard file"),
    "Parquet": (lambda f: written(f, b"PAR1\x15"), "is a Parquet file"),
    "UTF-16": (lambda f: written(f, '{"text": "a"}'.encode("utf-16")), "is a UTF-16 file"),
    "pretty-printed": (
        lambda f: written(f, json.dumps({"text": "a"}, indent=1).encode()),
        "spread over several lines",
    ),
    "one list": (lambda f: written(f, b'[{"text": "a"}]'), "is one JSON array"),
    "loop": (lambda f: f.symlink_to(f) or f, "cannot be read (Too many levels"),
}


@pytest.mark.parametrize(("make", "says"), FILES.values(), ids=FILES)
def test_bad_file_error_is_one_sentence(tmp_path, make, says):
    file = make(tmp_path / "rows.jsonl")
    def read(): cached_windows(file, ByteTokenizer(), 8, cache=tmp_path / "cache")
    with pytest.raises(DataError) as error:
        with nobody() if says.endswith("denied)") else nullcontext(): read()
    assert str(file) in str(error.value)
    check_sentence(str(error.value).replace(f"{tmp_path}/", ""), says)
    if says == "no text": return
    with pytest.raises(DataError, match="rows.jsonl|/dev/zero"):
        with nobody() if says.endswith("denied)") else nullcontext(): list(read_texts(file))


@pytest.mark.linux
def test_io_error_while_reading():
    with pytest.raises(DataError) as error:  # a regular file that answers with an I/O error
        list(read_jsonl("/proc/self/mem"))
    check_sentence(str(error.value), "/proc/self/mem, line 1: cannot be read (Input/output error)")
    with pytest.raises(DataError) as error: cached_windows("/proc/self/mem", ByteTokenizer(), 8)
    check_sentence(str(error.value), "/proc/self/mem cannot be read (Input/output error)")


BYTES = st.lists(st.one_of(st.binary(max_size=6),
                           st.sampled_from([b'{"text": "', b'"}', b'{"text": "a"}', b"\n", b"\r\n",
                                            b"\\ud83d", b"\\ude42", b"\\u0000", b"\xff", b"\xef\xbb\xbf",
                                            b"\0", b"NaN", b"1e999", b"[" * 2000, b"{", b"}", b'"', b":",
                                            b",", b"\xe2\x80\xa8", b"\xc3\xa9", b"9" * 5000, b"-", b".",
                                            b"null", b"\x1f\x8b", b'{"text": ""}'])),
                 max_size=12).map(b"".join)


@forall(400, content=BYTES)
def test_random_bytes_give_rows_or_one_error(content):
    file = written(Path(mkdtemp()) / "any.jsonl", content)
    try: texts = list(read_texts(file))
    except DataError as e:
        check_sentence(str(e).replace(". ", ""), str(file))
        with pytest.raises(DataError): cached_windows(file, ByteTokenizer(), 8)
        return
    assert texts
    if any(texts):
        assert cached_windows(file, ByteTokenizer(), 8).n_bytes == sum(len(t.encode()) for t in texts)


def test_unicode_line_separators_do_not_split_rows(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"text": "a\u2028b\u2029c\x85d"}\n{"text": "e"}'.encode())
    assert list(read_texts(tmp_path / "a.jsonl")) == ["a\u2028b\u2029c\x85d", "e"]


def test_byte_order_mark_is_removed(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}')
    assert list(read_texts(tmp_path / "a.jsonl")) == ["a"]
    (tmp_path / "b.jsonl").write_bytes('{"text": "a"}'.encode("utf-16"))
    with pytest.raises(DataError, match="is a UTF-16 file; convert it to UTF-8 with `iconv"):
        list(read_texts(tmp_path / "b.jsonl"))


def test_unreadable_files(tmp_path):
    with pytest.raises(DataError, match="No such file or directory.; check the path"):
        list(read_texts(tmp_path / "missing"))
    with pytest.raises(DataError, match="is a directory"): list(read_texts(tmp_path))
    with pytest.raises(DataError, match="cannot be read"): list(read_texts("nul\0byte"))
    (tmp_path / "empty").write_bytes(b"\n \r\n")
    with pytest.raises(DataError, match="holds no rows"): list(read_texts(tmp_path / "empty"))


def test_pack_without_text_raises():
    for nothing in ([], [""], ["", ""]):
        with pytest.raises(DataError, match="no text"): pack(nothing, ByteTokenizer(), 8)
    for context, overlap in ((8, 8), (8, -1), (0, 0)):
        with pytest.raises(DataError, match="overlap must be"): pack(["a"], ByteTokenizer(), context, overlap)


# Preprocessing ------------------------------------------------------------------------------------

RULES = """
import dataclasses

@dataclasses.dataclass
class Shout:
    mark: "str" = "!"
    def __call__(self, row): return {"text": row["text"] + self.mark}

shout, CONSTANT = Shout(), 7
def same(row): return row
def drop(row): return None
def odd(row): return row if row["n"] % 2 else None
def renamed(row): return {"txt": row["text"]}
def listed(row): return {"text": [row["text"]]}
def tupled(row): return {"text": ()}
def half(row): return {"text": "a" + chr(0xD83D)}
def a_text(row): return row["text"]
def generator(row): yield row
async def later(row): return row
def fails(row):
    value = row["text"]
    return helper(value)
def helper(value): return 1 / len(value[:0])
def leaves(row): raise SystemExit(3)
def loops(row): return loops(row)
def talks(row): raise ValueError("two\\nlines. And " + "more " * 500)
def strange(row): return {"text": row["text"], 7: 1, None: 2}
"""


@pytest.fixture
def rules(tmp_path):
    (tmp_path / "rules.py").write_text(RULES)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"row {n}", "n": n}) + "\n"
                                                 for n in range(6)))
    return tmp_path


def both_ways(rules, spec, **more):
    "What read_texts and the cache make of the file."
    windows = cached_windows(rules / "rows.jsonl", ByteTokenizer(), 8, preprocess=spec, **more)
    texts = list(read_texts(rules / "rows.jsonl", spec))
    assert windows.tokens[:].tolist() == pack(texts, ByteTokenizer(), 8).tokens.tolist()
    return texts, windows.source["dropped"]


def test_preprocess_changes_and_drops_rows(rules, monkeypatch):
    odd = ["row 1", "row 3", "row 5"]
    assert both_ways(rules, f"{rules}/rules.py:odd") == (odd, 3)
    assert both_ways(rules, lambda row: {"text": row["text"][4:]}) == (list("012345"), 0)
    assert both_ways(rules, f"{rules}/rules.py:shout")[0][0] == "row 0!"
    assert both_ways(rules, f"{rules}/rules.py:strange")[0][0] == "row 0"
    monkeypatch.chdir(rules)  # importable from the working directory
    (rules / "package").mkdir()
    (rules / "package" / "inner_rules.py").write_text("from .more import odd")
    (rules / "package" / "more.py").write_text("def odd(row): return row if row['n'] % 2 else None")
    for spec in ("rules.py:odd", "rules:odd", "package.inner_rules:odd"):
        assert both_ways(rules, spec) == (odd, 3)


FUNCTIONS = {  # spec → part of the message
    "no colon": ("rules", "'rules' does not name a function"),
    "no name": ("rules.py:", "does not name a function"),
    "no module": (":odd", "does not name a function"),
    "a path without .py": ("here/rules:odd", "does not name a function"),
    "empty": ("", "does not name a function"),
    "line break": ("a\nb:c", "does not name a function"),
    "missing file": ("nowhere.py:odd", "nowhere.py cannot be read (No such file or directory)"),
    "a folder": ("folder.py:odd", "folder.py cannot be read (Is a directory)"),
    "zero byte": ("a\0.py:odd", "cannot be read"),
    "missing module": ("no_such_rules:odd", "there is no module 'no_such_rules' to import from"),
    "missing submodule": ("json.no_such:odd", "there is no module 'json.no_such'"),
    "inside a module": ("rules.odd:x", "there is no module 'rules.odd'"),
    "misspelled": ("rules.py:oddd", "rules.py has no 'oddd'; did you mean 'odd'?"),
    "no such name": ("rules.py:zzzz", "has no 'zzzz'; check the name"),
    "not callable": ("rules.py:CONSTANT", "is not a function, but a number"),
    "itself": ("__main__:x", "there is no module '__main__'"),
    "fails": (
        "bad.py:f",
        "bad.py cannot be loaded, error in bad.py, line 2 (ZeroDivisionError: division by zero)",
    ),
    "fails as a module": ("bad:f", "/bad.py, line 2 (ZeroDivisionError: division by zero)"),
    "fails deeper": ("deeper.py:f", "error in deeper.py, line 1 (ZeroDivisionError"),
    "in its package": ("broken.sub:f", "__init__.py, line 1 (NameError"),
    "not Python": ("syntax.py:f", "error in syntax.py, line 1 (SyntaxError: "),
    "imports what is missing": ("needs.py:f", "(ModuleNotFoundError: No module named 'not_there')"),
    "leaves": ("leave.py:f", "error in leave.py, line 1 (SystemExit: 3)"),
    "not text": ("binary.py:f", "error"),
    "zero bytes": ("zero.py:f", "error"),
}


@pytest.fixture
def bad_rules(rules, monkeypatch):
    monkeypatch.chdir(rules)
    monkeypatch.setattr(sys, "path", [*sys.path])
    modules = {"bad": "x = 1\ny = x / 0", "deeper": "import bad", "syntax": "def f(:",
               "needs": "import not_there", "leave": "raise SystemExit(3)", "binary": "\udcff\udcfe",
               "zero": "x = 1\0"}
    for name, content in modules.items():
        (rules / f"{name}.py").write_bytes(content.encode(errors="surrogateescape"))
    (rules / "folder.py").mkdir()
    (rules / "broken").mkdir()
    (rules / "broken" / "__init__.py").write_text("oops")
    return rules


@pytest.mark.parametrize(("spec", "says"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_missing_function_error_is_one_sentence(bad_rules, spec, says):
    for use in (lambda: load_object(spec, "data.preprocess"),
                lambda: cached_windows("rows.jsonl", ByteTokenizer(), 8, preprocess=spec),
                lambda: list(read_texts("rows.jsonl", spec))):
        with pytest.raises(DataError) as error: use()
        check_sentence(str(error.value), '"data.preprocess": ', says)
    assert "bad" not in sys.modules and "broken" not in sys.modules


FAILURES = { # function → part of the message about line 1
    "fails": "preprocess rules.py:fails failed in rules.py, line 23 (ZeroDivisionError: division by zero); "
             "fix the function or the row",
    "leaves": "(SystemExit: 3)", "loops": "(RecursionError: ", "talks": "(ValueError: two lines. And more",
    "a_text": "returned str, not a row",
    "generator": "returned generator, not a row", "later": "returned coroutine, not a row",
    "CONSTANT": "is not a function",
    "renamed": 'after preprocess rules.py:renamed, there is no field "text"; the row has "txt"',
    "listed": '"text" must be a string, found a list',
    "tupled": "found a tuple", "half": "after preprocess rules.py:half, a text holds half a character"}


@pytest.mark.filterwarnings("ignore:coroutine")
@pytest.mark.parametrize(("name", "says"), FAILURES.items(), ids=FAILURES)
def test_failing_function_error_is_one_sentence(rules, monkeypatch, name, says):
    monkeypatch.chdir(rules)
    for use in (
        lambda f: cached_windows("rows.jsonl", ByteTokenizer(), 8, preprocess=f),
        lambda f: list(read_texts("rows.jsonl", f)),
    ):
        with pytest.raises(DataError) as error: use(f"rules.py:{name}")
        place = '"data.preprocess"' if name == "CONSTANT" else "rows.jsonl, line 1: "
        check_sentence(str(error.value).replace("lines. And", "lines And"), place,
                       says.replace("lines. And", "lines And"))
    assert list(cache_dir().iterdir()) == []
    with pytest.raises(DataError, match="rows.jsonl, line 1: preprocess len returned int"):
        list(read_texts("rows.jsonl", len))
    with pytest.raises(DataError, match=r"preprocess ord failed \(TypeError"):
        list(read_texts("rows.jsonl", ord))


def test_dropping_every_row_raises(rules):
    with pytest.raises(DataError) as error: both_ways(rules, f"{rules}/rules.py:drop")
    check_sentence(str(error.value),
                   f"{rules}/rows.jsonl: preprocess {rules}/rules.py:drop dropped every row")


def test_edited_function_is_reloaded(rules, monkeypatch):
    "In the same process and second, with the same size: the current content runs, with its own cache key."
    monkeypatch.chdir(rules)
    for place in ("quick.py", "quick"):
        seen = []
        for letter in "abca":
            (rules / "quick.py").write_text(f"def f(row): return {{'text': '{letter}'}}")
            windows = cached_windows("rows.jsonl", ByteTokenizer(), 8, preprocess=f"{place}:f")
            assert set(bytes(i for i in windows.tokens[:].tolist() if i < 256).decode()) == {letter}
            seen.append(windows.source["key"])
        assert len(set(seen)) == 3 and seen[0] == seen[3]


def test_module_is_executed_once_per_content(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "counting.py").write_text("open('log', 'a').write('x')\ndef f(row): return row")
    first, second = load_object("counting.py:f", "k"), load_object("counting.py:f", "k")
    assert first is second and (tmp_path / "log").read_text() == "x"
    assert load_object("json:loads", "k")("[1]") == [1] and load_object("math:sqrt", "k")(9) == 3


# Cache --------------------------------------------------------------------------------------------

def same_batches(one, two):
    pairs = [pair for i in range(-1, len(one)) for pair in zip(one.batch([i]), two.batch([i]))]
    return len(one) == len(two) and all(a.tolist() == b.tolist() for a, b in pairs)


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "huggingface",
                                  pytest.param("wide", marks=pytest.mark.long)])
@forall(60, **PACKED)
def test_cached_and_in_memory_batches_agree(kind, documents, shape):
    home, tok = Path(mkdtemp()), ByteTokenizer(65_536) if kind == "wide" else tokenizer(kind)
    file = write_documents(home / "rows.jsonl", documents)
    memory = pack(documents, tok, *shape)
    for windows in (
        cached_windows(file, tok, *shape, cache=home / "cache"),
        cached_windows(file, tok, *shape, cache=home / "cache"),
    ):
        assert (
            len(windows.tokens) == len(memory.tokens) and windows.tokens[:].tolist() == memory.tokens.tolist()
        )
        assert windows.tokens.dtype == memory.tokens.dtype == (np.uint32 if kind == "wide" else np.uint16)
        assert windows.n_bytes == memory.n_bytes and same_batches(windows, memory)
        check_windows(windows, documents, tok)


def test_windows_source_and_cache_metadata(tmp_path, monkeypatch):
    file = write_documents(tmp_path / "rows.jsonl", ["one", "two 🙂"])
    windows = cached_windows(str(file), ByteTokenizer(), 4)
    key = windows.source["key"]
    assert windows.source == {"path": str(file), "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
                              "documents": 2, "dropped": 0, "tokens": 15, "cache": str(cache_dir() / key),
                              "key": key}
    assert (
        json.loads(json.dumps(windows.source)) == windows.source
        and pack(["one"], ByteTokenizer(), 4).source == {}
    )
    meta = json.loads((cache_dir() / key / "meta.json").read_text())
    assert meta == {
        "path": str(file),
        "sha256": windows.source["sha256"],
        "vocab_size": 259,
        "preprocess": None,
        "tokens": 15,
        "bytes": 11,
        "documents": 2,
        "dropped": 0,
        "dtype": "uint16",
        "tokens_sha256": hashlib.sha256((cache_dir() / key / "tokens.bin").read_bytes()).hexdigest(),
    }
    assert (cache_dir() / key / "tokens.bin").stat().st_size == 30
    assert cache_dir(tmp_path) == tmp_path and cache_dir("~") == Path.home()
    monkeypatch.delenv("MLX_PRETRAIN_CACHE")
    assert cache_dir() == Path.home() / ".cache" / "mlx-pretrain"
    with pytest.raises(DataError, match="cannot be located .*; set MLX_PRETRAIN_CACHE"):
        cache_dir("~no-such-user-here/x")


def test_cache_key_covers_everything_tokens_depend_on(tmp_path, rules):
    file, again = (write_documents(tmp_path / name, ["one", "two"]) for name in ("a.jsonl", "b.jsonl"))
    other = write_documents(tmp_path / "c.jsonl", ["one", "tow"])
    def key(file=file, tok=None, context=8, overlap=0, **more):
        return cached_windows(file, tok or ByteTokenizer(), context, overlap, **more).source["key"]
    same = [key(), key(), key(again), key(context=4, overlap=2),
            key(tok=load_tokenizer(saved(ByteTokenizer())))]
    different = [same[0], key(other), key(tok=ByteTokenizer(300)),
                 key(tok=ByteTokenizer(special_tokens=SpecialTokens(eos="<end>"))),
                 key(tok=tokenizer("sentencepiece")), key(preprocess=f"{rules}/rules.py:same"),
                 key(preprocess=f"{rules}/rules.py:shout")]
    (rules / "rules.py").write_text(RULES.replace("CONSTANT = Shout(), 7", "CONSTANT = Shout('?'), 7"))
    different.append(key(preprocess=f"{rules}/rules.py:shout"))
    assert len(set(same)) == 1 and len(set(different)) == len(different)
    assert sorted(p.name for p in cache_dir().iterdir()) == sorted(different)


def test_function_object_is_not_cached(rules):
    def windows(letter):
        return cached_windows(rules / "rows.jsonl", ByteTokenizer(), 8,
                              preprocess=lambda row: {"text": letter})
    a = windows("a")  # the same code, and another meaning
    b = windows("b")
    assert 97 in a.tokens[:] and 97 not in b.tokens[:] and 98 in b.tokens[:]
    assert a.source["key"] is None and a.source["cache"] is None and list(cache_dir().iterdir()) == []
    # its place on the disk is gone, its content is not
    assert a.batch([0]).inputs.tolist() == [[257, 97, 258, 257, 97, 258, 257, 97]]


def test_file_is_tokenized_once(tmp_path, monkeypatch):
    file, opened, made = write_documents(tmp_path / "rows.jsonl", ["one"]), [], []
    open_file, write = jsonl.open_data_file, token_cache._write_cache
    monkeypatch.setattr(jsonl, "open_data_file", lambda path: opened.extend([path] * (path == file))
                        or open_file(path))
    monkeypatch.setattr(token_cache, "_write_cache", lambda *args: made.append(args) or write(*args))
    cached_windows(file, ByteTokenizer(), 8)
    assert len(opened) == 2 and len(made) == 1  # once to hash, once to read
    cached_windows(file, ByteTokenizer(), 8)
    assert len(opened) == 3 and len(made) == 1


DAMAGE = {
    "cut off": lambda d: os.truncate(d / "tokens.bin", 4),
    "odd size": lambda d: os.truncate(d / "tokens.bin", 5),
    "emptied": lambda d: os.truncate(d / "tokens.bin", 0),
    "another token": lambda d: (d / "tokens.bin").write_bytes(b"\7" + (d / "tokens.bin").read_bytes()[1:]),
    "too long": lambda d: (d / "tokens.bin").write_bytes((d / "tokens.bin").read_bytes() * 2),
    "a pipe": lambda d: (d / "tokens.bin").unlink() or os.mkfifo(d / "tokens.bin"),
    "no tokens": lambda d: (d / "tokens.bin").unlink(),
    "no meta": lambda d: (d / "meta.json").unlink(),
    "cut meta": lambda d: os.truncate(d / "meta.json", 20),
    "meta of text": lambda d: (d / "meta.json").write_text("[]"),
    "no hash": lambda d: (d / "meta.json").write_text(
        (d / "meta.json").read_text().replace('"tokens_sha256"', '"tokens_md5"')
    ),
    "missing field": lambda d: (d / "meta.json").write_text(
        (d / "meta.json").read_text().replace('"bytes"', '"bites"')
    ),
    "wrong field": lambda d: (d / "meta.json").write_text(
        (d / "meta.json").read_text().replace('"documents": 2', '"documents": "2"')
    ),
    "binary meta": lambda d: (d / "meta.json").write_bytes(b"\xff\xfe"),
    "deep meta": lambda d: (d / "meta.json").write_text("[" * 100_000),
    "nothing": lambda d: [f.unlink() for f in d.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_cache_is_rebuilt(tmp_path, damage):
    file = write_documents(tmp_path / "rows.jsonl", ["one", "two"])
    first = cached_windows(file, ByteTokenizer(), 8)
    folder, memory = Path(first.source["cache"]), pack(["one", "two"], ByteTokenizer(), 8)
    damage(folder)
    assert token_cache._open_cache(folder, 259) is None
    assert same_batches(cached_windows(file, ByteTokenizer(), 8), memory)
    assert token_cache._open_cache(folder, 259) is not None
    assert [path.name for path in cache_dir().iterdir()] == [folder.name]


@pytest.mark.parametrize("size", [0, 7, 30])
def test_cache_truncated_while_in_use_raises(tmp_path, size):
    "A mapped file would end the process with SIGBUS."
    file = write_documents(tmp_path / "rows.jsonl", ["one two three four"] * 2)
    windows = cached_windows(file, ByteTokenizer(), 4)
    folder, before = Path(windows.source["cache"]), windows.batch([0, 3]).inputs.tolist()
    os.truncate(folder / "tokens.bin", size)
    for i in range(len(windows)):
        if 2 * min(4 * i + 5, len(windows.tokens)) <= size: windows.batch([-1, i]); continue
        with pytest.raises(DataError) as error: windows.batch([-1, i])
        check_sentence(str(error.value),
                       f"the token cache {folder} was cut off while it was in use; start again")
    assert cached_windows(file, ByteTokenizer(), 4).batch([0, 3]).inputs.tolist() == before


def test_cache_deleted_or_rebuilt_while_in_use(tmp_path):
    file = write_documents(tmp_path / "rows.jsonl", ["one two three four"] * 2)
    windows = cached_windows(file, ByteTokenizer(), 4)
    shutil.rmtree(windows.source["cache"])
    again = cached_windows(file, ByteTokenizer(), 4)
    assert same_batches(windows, again)
    os.truncate(again.tokens.folder / "tokens.bin", 2)
    cached_windows(file, ByteTokenizer(), 4)
    assert same_batches(windows, pack(["one two three four"] * 2, ByteTokenizer(), 4))


def test_token_file_is_closed(tmp_path):
    file = write_documents(tmp_path / "rows.jsonl", ["one"])
    handle = cached_windows(file, ByteTokenizer(), 4).tokens._handle
    gc.collect()
    with pytest.raises(OSError, match="Bad file"): os.fstat(handle)


def test_corrupt_write_is_detected(tmp_path, monkeypatch):
    write = token_cache._write_cache
    def rot(folder, *how):
        write(folder, *how)
        (folder / "tokens.bin").write_bytes(b"\0" * (folder / "tokens.bin").stat().st_size)
    monkeypatch.setattr(token_cache, "_write_cache", rot)
    with pytest.raises(DataError) as error:
        cached_windows(write_documents(tmp_path / "rows.jsonl", ["one"]), ByteTokenizer(), 4)
    check_sentence(str(error.value), "cannot be written (what was read back differs from what was written)",
                   "set MLX_PRETRAIN_CACHE")


def test_corrupt_token_ids_never_reach_mlx(tmp_path, monkeypatch):
    file = write_documents(tmp_path / "rows.jsonl", ["one two three"])
    windows = cached_windows(file, ByteTokenizer(), 4)
    folder = Path(windows.source["cache"])
    tokens = np.fromfile(folder / "tokens.bin", np.uint16)
    for place, value in ((0, 259), (7, 65535), (len(tokens) - 1, 300)):
        bad = tokens.copy()
        bad[place] = value
        bad.tofile(folder / "tokens.bin")
        with monkeypatch.context() as m, pytest.raises(DataError) as error:
            m.setattr(data.mx, "array", lambda *a: pytest.fail("reached MLX"))
            windows.batch(range(len(windows)))
        check_sentence(str(error.value),
                       f"the token cache {folder} is damaged (id {value} of 259); delete this folder")
    wide = replace(pack(["a"], ByteTokenizer(65_536), 4), tokens=np.array([1, 2**32 - 1, 3], np.uint32))
    with pytest.raises(DataError, match="made id -1"): wide.batch([0])


BUILDER = """
import sys, time
from mlx_pretrain.data import cached_windows
from mlx_pretrain.tokenizer import ByteTokenizer
print("ready", flush=True); sys.stdin.readline()
preprocess = sys.argv[2] if len(sys.argv) > 2 else None
windows = cached_windows(sys.argv[1], ByteTokenizer(), 8, preprocess=preprocess)
print(windows.batch(range(len(windows))).inputs.sum().item(), windows.source["key"])
"""


def builder(*args):
    return subprocess.Popen([sys.executable, "-c", BUILDER, *map(str, args)], stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, text=True)


@pytest.mark.long
def test_concurrent_writers_of_one_cache(tmp_path):
    file = write_documents(tmp_path / "rows.jsonl", [f"document {n} " * 50 for n in range(4000)])
    for damaged in (False, True):
        if damaged: os.truncate(next(cache_dir().glob("*/tokens.bin")), 100)
        writers = [builder(file) for _ in range(3)]
        for writer in writers: assert writer.stdout.readline() == "ready\n"
        for writer in writers: writer.stdin.write("\n"); writer.stdin.flush()
        outputs = {writer.communicate(timeout=120)[0] for writer in writers}
        assert [w.returncode for w in writers] == [0, 0, 0] and len(outputs) == 1
        assert [p.name for p in cache_dir().iterdir()] == [outputs.pop().split()[1]]


def test_faster_writer_wins(tmp_path, monkeypatch):
    "Between the last look and the rename another process commits: its folder stays, ours goes."
    file, write = write_documents(tmp_path / "rows.jsonl", ["one", "two"]), token_cache._write_cache
    def beaten(*args):
        write(*args)
        monkeypatch.setattr(token_cache, "_write_cache", write)
        beaten.other = cached_windows(file, ByteTokenizer(), 8).source["cache"]
        beaten.made = Path(beaten.other).stat().st_ino
    monkeypatch.setattr(token_cache, "_write_cache", beaten)
    windows = cached_windows(file, ByteTokenizer(), 8)
    assert Path(windows.source["cache"]).stat().st_ino == beaten.made and same_batches(
        windows, pack(["one", "two"], ByteTokenizer(), 8)
    )
    assert [str(p) for p in cache_dir().iterdir()] == [beaten.other]


def in_use(file):
    with open(file) as f:
        try: fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError: return True


def test_killed_writer_leftovers_are_removed(tmp_path):
    file = write_documents(tmp_path / "rows.jsonl", ["one", "two", "three"])
    (tmp_path / "slow.py").write_text(
        "import os, time\ndef f(row):\n    if os.environ.get('SLOW'): time.sleep(600)\n    return row"
    )
    os.environ["SLOW"] = "yes"
    try: writer = builder(file, f"{tmp_path}/slow.py:f")
    finally: del os.environ["SLOW"]
    writer.stdin.write("\n"); writer.stdin.flush()
    while not (left := list(cache_dir().glob(".*-*/tokens.bin"))): time.sleep(0.01)
    while not in_use(left[0]): time.sleep(0.01)
    os.utime(left[0], (1, 1))                                                         # as if it were old
    def key():
        return cached_windows(file, ByteTokenizer(), 8, preprocess=f"{tmp_path}/slow.py:f").source["key"]
    made = key()
    assert left[0].exists()  # somebody is at it: nobody sweeps it away
    os.kill(writer.pid, signal.SIGKILL)
    writer.communicate()
    (cache_dir() / made / "meta.json").unlink()
    assert key() == made and [p.name for p in cache_dir().iterdir()] == [made]


def test_recent_or_locked_folder_is_not_removed(tmp_path):
    (tmp_path / ".key-1-1").mkdir()
    file = written(tmp_path / ".key-1-1" / "tokens.bin", b"")
    for age, locked, stays in ((0, False, True), (100, True, True), (100, False, False)):
        os.utime(file, (time.time() - age,) * 2)
        with open(file) as f:
            if locked: fcntl.flock(f, fcntl.LOCK_EX)
            token_cache._remove_leftovers(tmp_path, "key")
        assert file.exists() == stays


@pytest.mark.parametrize("where", ["fsync", "_commit"])
def test_full_disk_error_leaves_no_files(tmp_path, monkeypatch, where):
    def full(*args): raise OSError(28, "No space left on device")
    monkeypatch.setattr(token_cache, where, full)
    with pytest.raises(DataError) as error:
        cached_windows(write_documents(tmp_path / "rows.jsonl", ["one"]), ByteTokenizer(), 8)
    check_sentence(str(error.value),
                   f"the token cache {cache_dir()} cannot be written (No space left on device)", "make room")
    assert list(cache_dir().iterdir()) == []


def test_unwritable_cache_directory(tmp_path):
    file = write_documents(tmp_path / "rows.jsonl", ["one"])
    for place in (file, file / "below"):
        with pytest.raises(DataError) as error: cached_windows(file, ByteTokenizer(), 8, cache=place)
        check_sentence(str(error.value), f"the token cache {place} cannot be written (",
                       "set MLX_PRETRAIN_CACHE to another folder")
    key = cached_windows(file, ByteTokenizer(), 8).source["key"]
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / key).write_text("a file where the folder should be")
    with pytest.raises(DataError, match="cannot be written"):
        cached_windows(file, ByteTokenizer(), 8, cache=tmp_path / "cache")
    assert os.listdir(tmp_path / "cache") == [key]


def test_file_changed_while_reading_raises(tmp_path):
    file = write_documents(tmp_path / "rows.jsonl", ["one", "two"])
    def grow(row):
        if row["text"] == "one":
            with open(file, "a") as f: f.write('{"text": "late"}\n')
        return row
    with pytest.raises(DataError) as error: cached_windows(file, ByteTokenizer(), 8, preprocess=grow)
    check_sentence(str(error.value), f"{file} changed while it was read")
    with pytest.raises(DataError, match="changed while it was read"):
        cached_windows(file, ByteTokenizer(), 8, preprocess=lambda row: file.unlink(missing_ok=True) or row)
    assert list(cache_dir().iterdir()) == []


def test_progress_bar_counts_file_bytes(tmp_path, monkeypatch, capfd):
    import tqdm
    bars = []
    class Bar(tqdm.tqdm):
        def __init__(self, **options):
            super().__init__(**options)
            bars.append((self, options))
    monkeypatch.setattr(tqdm, "tqdm", Bar)
    file = write_documents(tmp_path / "rows.jsonl", ["one", "two"] * 500)
    cached_windows(file, ByteTokenizer(), 8, preprocess=lambda row: row if row["text"] == "one" else None)
    (bar, options), = bars
    assert (
        bar.n == options["total"] == file.stat().st_size and options["unit"] == "B" and options["delay"] == 2
    )
    assert capfd.readouterr() == ("", "")                                            # too fast to be shown
    cached_windows(file, ByteTokenizer(), 8)
    cached_windows(file, ByteTokenizer(), 8)
    assert len(bars) == 2  # nothing to do, nothing to show


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "huggingface"])
def test_untokenizable_document_is_named(tmp_path, kind):
    tok = load_tokenizer(saved(tokenizer(kind)))
    encode = tok._encode_batch
    def broken(texts):
        if any("bad" in text for text in texts): return [np.array([tok.vocab_size])]
        return encode(texts)
    tok._encode_batch = broken
    file = write_documents(tmp_path / "rows.jsonl", ["one", "two", "a bad one", "four"])
    with pytest.raises(DataError) as error: cached_windows(file, tok, 8)
    check_sentence(str(error.value), f"{file}, line 3: the tokenizer made id {tok.vocab_size}, but has only")
    with pytest.raises(DataError, match="document 3: the tokenizer made id"):
        pack(["one", "two", "bad"], tok, 8)
    with pytest.raises(DataError, match="document 2: a text holds half a character"):
        pack(["one", "a\ud800"], tok, 8)


# Settings -----------------------------------------------------------------------------------------

def test_data_config(tmp_path):
    def load(text):
        (tmp_path / "data.yaml").write_text(text)
        return load_config(DataConfig, tmp_path / "data.yaml")
    cfg = load("preprocessing: {max_context_size: 64, chunk_overlap: null}\n"
               "tokenizer: {normal_vocab_size: 300, special_tokens: {eos: <end>}}\n")
    tok = make_tokenizer(cfg)
    assert (cfg.preprocessing.chunk_overlap, tok.vocab_size, tok.piece(tok.eos_id)) == (0, 303, "<end>")
    for text, message in (("preprocessing: {max_context_size: 8, chunk_overlap: 8}",
                           "must be less than max_context_size"),
                          ("preprocessing: {max_context_size: 1}", "greater than or equal to 2"),
                          ("tokenizer: {normal_vocab_size: 255}", "256"),
                          ("tokenizer_path: 3", "tokenizer_path"), ("inputfile: x", "input_file")):
        with pytest.raises(ConfigError, match=message): load(text)
    with pytest.raises(DataError, match="mlx-pretrain tokenizer"):
        make_tokenizer(load("tokenizer_path: nowhere"))


def test_num_steps_by_hand():
    assert [num_steps(*a) for a in ((10, 4, 1), (10, 4, 2), (1, 8, 3), (8, 8, 1))] == [3, 5, 1, 1]


def test_data_error_is_defined_once(): assert data.DataError is tokenizers.DataError is DataError
