"Shared by tests: texts that are easily lost, the kinds of tokenizers, and the form of error messages."
import json
from functools import cache
from tempfile import mkdtemp

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_pretrain.run import read_metrics
from mlx_pretrain.tokenizer import ByteTokenizer, HFTokenizer, train_sentencepiece

import mlx.core as mx  # isort: skip (after mlx_pretrain)
from mlx.utils import tree_flatten  # isort: skip


def forall(examples=150, **strategies):
    "Hypothesis's `given` without a deadline: the machine may be busy."
    return lambda test: settings(deadline=None, max_examples=examples)(given(**strategies)(test))


ENGLISH = ["The old man counts the boats.\nHe has counted them every morning for forty years.\n",
           "  The baker carries out the bread. " * 3]
NASTY = ["<pad>", "<bos>", "<eos>", "<unk>", "<0x41>", "</s>", "▁", "▅", "\n", "\r", " ", "  ", "\0", "\t",
         "\u2028", "\ufeff", "\ufffd", "é", "e\u0301", "🙂", "the "]
TEXT = st.one_of(st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
                 st.lists(st.sampled_from(NASTY), max_size=12).map("".join),
                 st.lists(st.one_of(st.sampled_from(NASTY), st.text(max_size=3).filter(str.isprintable)),
                          max_size=8).map("".join))


@cache
def tokenizer(kind):
    "A tokenizer of each kind, cached."
    home = mkdtemp()
    if kind == "bytes": return ByteTokenizer()
    if kind == "sentencepiece": return train_sentencepiece(ENGLISH, 290, home)
    ByteTokenizer().save(home)
    return HFTokenizer(home)


KINDS = pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "huggingface"])


def saved(tok):
    "A directory with a saved tokenizer."
    home = mkdtemp()
    tok.save(home)
    return home


def write_documents(path, documents):
    "A JSON Lines file of texts."
    path.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    return path


REMEDY = ("write", "save", "keep", "remove", "fix", "convert", "give", "check", "copy", "make", "set", "add",
          "unpack", "merge", "let", "return", "name", "did you", "start", "delete", "a row is",
          "each line must", "each row needs", "change")


def check_sentence(sentence, *parts):
    "One sentence: no line break, a remedy after the last semicolon, and the given parts."
    assert "\n" not in sentence and ". " not in sentence and not sentence.endswith("."), sentence
    assert "Traceback" not in sentence and len(sentence) < 600, sentence
    assert sentence.rpartition("; ")[2].startswith(REMEDY), sentence
    for part in parts: assert part in sentence, (part, sentence)


def equal(a, b):
    "Whether two sets of arrays have the same names and the same bits."
    pairs = [*zip(sorted(tree_flatten(a)), sorted(tree_flatten(b)), strict=True)]
    return bool(pairs) and all(name == other and mx.array_equal(x, y).item()
                               for (name, x), (other, y) in pairs)


def lines_of(run_dir):
    "Lines of metrics.jsonl without speeds and resume events."
    lines = [line for line in read_metrics(run_dir) if line.get("event") != "resume"]
    return [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]
