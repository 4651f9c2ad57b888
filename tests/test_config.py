"config: every mistake is one line with location, key and fix, all in one error; YAML round trips are exact."
import json
import logging
import math
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import Field, ValidationError, model_validator

import mlx_pretrain  # noqa: F401 (before MLX)
from mlx_pretrain import config
from mlx_pretrain.config import (
    MAX_BYTES, ConfigError, ConfigSection, UserError, dump_yaml, load_config, read_yaml, to_yaml)
from mlx_pretrain.pretrain import PretrainConfig


class Windows(ConfigSection):
    size: int = Field(1024, ge=2)
    "Tokens in a window."
    overlap: int = Field(0, ge=0)
    "Tokens that two windows share."

    @model_validator(mode="after")
    def check_overlap(self):
        if self.overlap >= self.size:
            raise ValueError(f"overlap {self.overlap} must be smaller than size {self.size}")
        return self


class Data(ConfigSection):
    input_file: str | None = None
    prompt_format: str = "{instruction}"
    windows: Windows = Windows()
    special: dict[str, str] = {}


class Optimizer(ConfigSection):
    kind: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = Field(1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    factor: int | float = 1


class Recipe(ConfigSection):
    name: str = ""
    overwrite: bool = False
    epochs: int = 1
    folder: Path | None = None
    data: Data = Data()
    optimizer: Optimizer = Optimizer()


class Demanding(ConfigSection):
    epochs: int
    inner: Windows = Windows()


class Hang(BaseException):
    "Not caught by `except Exception`."


@pytest.fixture(autouse=True)
def no_hang():
    "Fail a test that hangs."
    def stop(*_): raise Hang
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text, name="c.yaml"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return name
    return write


def complaint(*args, cls=Recipe):
    with pytest.raises(ConfigError) as e: load_config(cls, *args)
    return str(e.value)


def check(message, mistakes):
    "One line per mistake, containing all its pieces in order."
    assert len(message.split("\n")) == len(mistakes), message
    for line, pieces in zip(message.split("\n"), mistakes, strict=True):
        at = 0
        for piece in pieces:
            assert piece in line[at:], (piece, line)
            at = line.index(piece, at) + len(piece)
        assert line.isprintable() and len(line) <= 1000, line


# ------------------------------------------------------------ mistakes in a file

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(f"{k}: &{k} [{','.join(['*' + j] * 9)}]\n"
                                               for j, k in ("ab", "bc", "cd", "de", "ef", "fg"))
INDENT = "check the indentation"
TAB = "a tab is not allowed here; use spaces"

MISTAKES = {  # name: (file, one tuple of pieces for each mistake)
    # keys
    "unknown key, similar": (
        "optimizer:\n  learning_rat: 1\n",
        [('line 2: "optimizer.learning_rat" is not a key', 'did you mean "optimizer.learning_rate"?')],
    ),
    "key of another section": (
        "\nlearning_rate: 1\n",
        [('line 2: "learning_rate" is not a key', 'did you mean "optimizer.learning_rate"?')],
    ),
    "slip in a key of another section": (
        "data:\n  windows:\n    learning_rte: 1\n",
        [('line 3: "data.windows.learning_rte"', 'did you mean "optimizer.learning_rate"?')],
    ),
    "unknown key, nothing near": (
        "data:\n  windows: {max_kinds: 1}\n",
        [('line 2: "data.windows.max_kinds" is not a key', "the keys here are size, overlap")],
    ),
    "unknown key without a value": (
        "overwrit:\n",
        [('line 1: "overwrit" is not a key', 'did you mean "overwrite"?')],
    ),
    "unknown section": (
        "optimiser:\n  kind: sgd\n",
        [('line 1: "optimiser" is not a key', 'did you mean "optimizer"?')],
    ),
    "section in itself": (
        "data:\n  data: {input_file: a}\n",
        [('line 2: "data.data" is not a key', 'did you mean "data"?')],
    ),
    "capitals": ("OVERWRITE: true\n", [('line 1: "OVERWRITE" is not a key', 'did you mean "overwrite"?')]),
    "hyphens": (
        "data: {input-file: a}\n",
        [('line 1: "data.input-file" is not a key', 'did you mean "data.input_file"?')],
    ),
    "a flag in a file": ("--epochs: 3\n", [('line 1: "--epochs" is not a key', 'did you mean "epochs"?')]),
    "a dotted key": (
        "data.windows.size: 3\n",
        [('line 1: "data.windows.size" is not a key', "write data: {windows: {size: …}}")],
    ),
    "a dotted key below a section": (
        "data:\n  windows.size: 3\n",
        [('line 2: "data.windows.size" is not a key', "write windows: {size: …}")],
    ),
    "key of digits": ("1: 2\n", [('line 1: "1" is not a key', "the keys here are name, overwrite")]),
    "merge key": (
        "data: &d\n  input_file: a\noptimizer:\n  <<: *d\n",
        [('line 4: "optimizer.<<" is not a key', "write the keys out")],
    ),
    "duplicate key": (
        "name: a\nepochs: 1\nname: b\n",
        [('line 3: "name" is already on line 1', "keep one of them")],
    ),
    "duplicate in a section": (
        "data:\n  input_file: a\n  'input_file': a\n",
        [('line 3: "data.input_file" is already on line 2', "keep one of them")],
    ),
    "duplicate section": (
        "data: {input_file: a}\nepochs: 1\ndata: {prompt_format: a}\n",
        [('line 3: "data" is already on line 1',)],
    ),
    "a key three times": (
        "epochs: 1\nepochs: 2\nepochs: 3\n",
        [('line 2: "epochs" is already on line 1',), ('line 3: "epochs" is already on line 1',)],
    ),
    "list as key": ("? [a]\n: 1\n", [("line 1: a key must be a plain word", "quote")]),
    "line break in a key": ('"a\\nb": 1\n', [('line 1: "a\\nb" is not a key',)]),
    "invisible character in a key": (
        "na\u200bme: a\n",
        [(r'line 1: "na\u200bme" is not a key', 'did you mean "name"?')],
    ),
    "blank from a web page": (
        "data:\n\u00a0\u00a0epochs: 1\n",
        [(r'line 2: "\xa0\xa0epochs" is not a key', 'did you mean "epochs"?')],
    ),
    "terminal escape in a key": ('"\\x1b[31mname": a\n', [('line 1: "\\u001b[31mname" is not a key',)]),
    # values
    "text for a number": (
        "optimizer:\n  learning_rate: fast\n",
        [('line 2: "optimizer.learning_rate" should be a number, not "fast"',)],
    ),
    "quoted number": (
        "optimizer: {learning_rate: '1e-4'}\n",
        [('line 1: "optimizer.learning_rate" should be a number, not "1e-4"', "remove the quotes")],
    ),
    "quoted whole number": (
        'epochs: "3"\n',
        [('line 1: "epochs" should be a whole number, not "3"', "remove the quotes")],
    ),
    "fraction for a whole number": (
        "epochs: 3.5\n",
        [('line 1: "epochs" should be a whole number, not 3.5',)],
    ),
    "exponent for a whole number": (
        "epochs: 1e3\n",
        [('line 1: "epochs" should be a whole number, not 1000.0', "write 1000")],
    ),
    "comma in a number": ("epochs: 1,000\n", [('line 1: "epochs" should be a whole number, not "1,000"',)]),
    "true for a number": ("epochs: true\n", [('line 1: "epochs" should be a whole number, not true',)]),
    "None": (
        "epochs: None\n",
        [('line 1: "epochs" should be a whole number, not "None"', "write null for the default")],
    ),
    "number for text": ("name: 2026\n", [('line 1: "name" should be text, not 2026', "put it in quotes")]),
    "true for text": ("name: true\n", [('line 1: "name" should be text, not true', "put it in quotes")]),
    "list for text": ("name: [a]\n", [('line 1: "name" should be text, not ["a"]',)]),
    "braces without quotes": (
        "data: {prompt_format: {instruction}}\n",
        [('"data.prompt_format" should be text, not {"instruction": null}',)],
    ),
    "yes for true": ("overwrite: yes\n", [('line 1: "overwrite" should be true or false, not "yes"',)]),
    "one for true": ("overwrite: 1\n", [('line 1: "overwrite" should be true or false, not 1',)]),
    "text for a section": (
        "data: file.jsonl\n",
        [('line 1: "data" should be a section, with keys of its own, not "file.jsonl"',)],
    ),
    "no blank after the colon": (
        "data:\n  input_file:a\n",
        [('line 1: "data" should be a section', "put a space after the colon")],
    ),
    "list for a section": (
        "data: [1]\n",
        [('line 1: "data" should be a section, with keys of its own, not [1]',)],
    ),
    "dashes in a section": (
        "data:\n- input_file: a\n",
        [('line 1: "data" should be a section', "remove the dashes")],
    ),
    "number for a list": (
        "optimizer:\n  betas: 0.9\n",
        [('line 2: "optimizer.betas" should be a list, such as [a, b], not 0.9',)],
    ),
    "list for a number": ("epochs: [1]\n", [('line 1: "epochs" should be a whole number, not [1]',)]),
    "list too short": (
        "optimizer:\n  betas: [0.9]\n",
        [('line 2: "optimizer.betas" has too few values', "add what is missing")],
    ),
    "list empty": ("optimizer:\n  betas: []\n", [('line 2: "optimizer.betas" has too few values',)]),
    "list too long": (
        "optimizer:\n  betas: [0.9, 0.9, 0.9]\n",
        [('line 2: "optimizer.betas" has 3 values', "keep 2")],
    ),
    "null in a list": (
        "optimizer:\n  betas:\n  - 0.9\n  -\n",
        [('line 4: "optimizer.betas.1" should be a number, not null',)],
    ),
    "no such choice": (
        "optimizer: {kind: adam}\n",
        [('line 1: "optimizer.kind" should be "adamw" or "sgd", not "adam"',)],
    ),
    "out of range": (
        "optimizer:\n  learning_rate: -1e-4\n",
        [('line 2: "optimizer.learning_rate" should be greater than 0, not -0.0001',)],
    ),
    "two fields at odds": (
        "data:\n  windows:\n    size: 4\n    overlap: 4\n",
        [('line 2: "data.windows": overlap 4 must be smaller than size 4',)],
    ),
    "either type": (
        "optimizer:\n  factor: a\n",
        [('line 2: "optimizer.factor" should be a whole number, not "a"',)],
    ),
    "nan": (
        "optimizer: {learning_rate: .nan}\n",
        [('"optimizer.learning_rate" should be a finite number, not NaN',)],
    ),
    "inf": (
        "optimizer: {learning_rate: -.Inf}\n",
        [('"optimizer.learning_rate" should be a finite number, not -Infinity',)],
    ),
    "inf by size": (
        "optimizer: {learning_rate: 1e999}\n",
        [('"optimizer.learning_rate" should be a finite number, not Infinity',)],
    ),
    "too many digits": (
        f"epochs: 1{'0' * 5000}\n",
        [('line 1: "epochs" should be a number below 2**63, not 1000', "…")],
    ),
    "just too large": (
        f"epochs: {2**63}\n",
        [('line 1: "epochs" should be a number below 2**63, not 9223372036854775808',)],
    ),
    "long text": (f"epochs: {'x' * 9999}\n", [('line 1: "epochs" should be a whole number, not "xxx', "…")]),
    "unpaired surrogate": (
        'name: "\\ud83d"\n',
        [('line 1: "name" should be text without an unpaired surrogate',)],
    ),
    "unpaired surrogate in a key": ('"\\ud83d": 1\n', [('line 1: "?" is not a key',)]),
    # tags, aliases, size
    "python tag": (
        "name: !!python/object/apply:os.system [ls]\n",
        [('line 1: "name" has the tag !!python/object/apply:os.system', "remove it")],
    ),
    "unknown tag": (
        "name: !env HOME\n",
        [('line 1: "name" has the tag !env, which has no meaning here', "remove it")],
    ),
    "tag on a section": (
        "data: !include a.yaml\n",
        [('line 1: "data" has the tag !include', "remove it")],
    ),
    "tag of another kind": (
        "data: !!seq {input_file: a}\n",
        [('line 1: "data" has the tag !!seq', "remove it")],
    ),
    "tag on everything": (
        "!recipe\nname: a\n",
        [("line 1: the configuration has the tag !recipe", "remove it")],
    ),
    "tag that does not fit": (
        "epochs: !!int three\n",
        [('"epochs" should be a number below 2**63, not three',)],
    ),
    "alias bomb": (BOMB, [("more than 10,000 values with all aliases expanded", "shorten it")]),
    "alias of itself": ("data: &a {data: *a}\n", [("more than 10,000 values",)]),
    "alias of itself, twice": ("data: &a [*a, *a]\n", [("more than 10,000 values",)]),
    "unknown alias": ("name: *x\n", [("line 1: this alias", "put text in quotes")]),
    "star in text": (
        "name: a\ndata: {input_file: *.jsonl}\n",
        [("line 2: text cannot begin with & or *", "put it in quotes")],
    ),
    "two anchors of one name": (
        "name: &a x\nepochs: &a 3\n",
        [("line 2: this anchor (& and a name) is defined twice", "rename one")],
    ),
    "deep brackets": ("a: " + "[" * 50_000, [("line 1: more than 32 levels of nesting",)]),
    "deep braces": ("a: " + "{a: " * 20_000, [("line 1: more than 32 levels",)]),
    "deep dashes": ("- " * 40_000, [("line 1: more than 32 levels",)]),
    "too long": (
        "#" * (MAX_BYTES + 1),
        [("c.yaml is longer than 100,000 bytes", "is it a data file by mistake?")],
    ),
    # not YAML
    "tab": ("data:\n\tinput_file: a\n", [("line 2: " + TAB,)]),
    "tab after a colon": ("name:\ta\n", [("line 1: " + TAB,)]),
    "colon in text": (
        "name: a: b\n",
        [("line 1: a colon is not expected here", "put text with a colon in quotes")],
    ),
    "bad indentation": (
        "data:\n    input_file: a\n  windows: 3\n",
        [("line 3: this does not continue the text before it", INDENT)],
    ),
    "indented first line": (
        "  name: a\nepochs: 1\n",
        [("line 2: this line does not continue those above", INDENT)],
    ),
    "apostrophe in quotes": ("name: 'it's'\n", [("line 1: this does not continue", "the quotation marks")]),
    "open quote": (
        "name: 'a\n\nepochs: 1\n",
        [("line 1: the quotation mark here is not closed", "close it")],
    ),
    "open bracket": ("name: a\nx: [1, 2\n\n", [("line 2: the bracket here is not closed",)]),
    "percent": (
        "name: a\nepochs: %3\n",
        [("line 2: text cannot begin with this character", "put it in quotes")],
    ),
    "Windows path in double quotes": (
        'data: {input_file: "C:\\data"}\n',
        [("line 1: a backslash starts an escape sequence", "single quotes")],
    ),
    "no such character": ('name: "\\U00110000"\n', [("c.yaml is not YAML", "single quotes")]),
    "line without a colon": (
        "name: a\nepochs\nfolder: a\n",
        [("line 2: this line is neither a key with a colon",)],
    ),
    "two documents": (
        "---\nname: a\n---\nname: b\n",
        [("line 3: a second document begins here", "keep one document")],
    ),
    "version of YAML": (
        "%YAML 9.9\n---\nname: a\n",
        [("line 1: this %YAML line cannot be used", "remove it")],
    ),
    "text after |": ("name: |x\n", [("line 1: after | or > the text begins on the next line",)]),
    "bracket too many": ("a: ]\n", [("line 1: a value is missing before this",)]),
    "TOML": (
        "[data]\ninput_file = 'a'\n",
        [("line 2: this line does not continue", "that the file is YAML")],
    ),
    "JSON Lines": (
        '{"text": "a"}\n{"text": "b"}\n',
        [("line 2: this line does not continue", "that the file is YAML")],
    ),
    "empty": ("", [("c.yaml is empty", "write at least one key")]),
    "comments only": ("# name: a\n", [("c.yaml is empty", "write at least one key")]),
    "only null": ("null\n", [("c.yaml is empty",)]),
    "list at the top": ("- name: a\n", [("c.yaml must have keys at the top", 'not [{"name": "a"}]')]),
    "text at the top": (
        "name:a\nepochs:3\n",
        [("c.yaml must have keys at the top, with a colon, a space", 'not "name:a epochs:3"')],
    ),
    # bytes
    "Latin-1": (
        b"epochs: 1\nname: caf\xe9\n",
        [("line 2: byte 0xe9 is not UTF-8", "save the file as UTF-8")],
    ),
    "UTF-16": ("name: a\n".encode("utf-16"), [("line 1: byte 0xff is not UTF-8", "save the file as UTF-8")]),
    "UTF-16 without a mark": (
        "name: a\n".encode("utf-16-le"),
        [("line 1: the control character U+0000", "save the file as UTF-8")],
    ),
    "control character": (
        "epochs: 1\nname: a\x07b\n",
        [("line 2: the control character U+0007 is not allowed in YAML", "delete it")],
    ),
    "zero bytes": (b"\0" * 10, [("line 1: the control character U+0000",)]),
    "byte order mark inside": (
        "epochs: 1\n\ufeffname: a\n",
        [(r'line 2: "\ufeffname" is not a key', 'did you mean "name"?')],
    ),
    "invisible line breaks": (
        "name: a\u2028b\nepochs: 1\n'\x85': 1\n",
        [
            (r"line 1: the invisible line break U+2028", r"or write \u2028 in double quotes"),
            ("line 3:", "U+0085"),
        ],
    ),
    # together
    "in the order of the file": (
        "epochz: 3\noptimizer:\n  betas: [a, 0.9]\n  kind: 5\n  kind: !x y\nfolder: !x y\nepochs: x\n",
        [
            ("line 1", "epochz"),
            ("line 3", "optimizer.betas.0"),
            ("line 4", "optimizer.kind"),
            ("line 5", "optimizer.kind"),
            ("line 6", "folder"),
            ("line 7", "epochs"),
        ],
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistake_is_one_line(write, case):
    text, mistakes = MISTAKES[case]
    message = complaint(write(text))
    check(message, mistakes)
    starts = ("c.yaml, line ", "c.yaml is ", "c.yaml must ")
    assert all(line.startswith(starts) for line in message.split("\n"))


def test_every_syntax_hint_is_reachable(write):
    "Every entry of the table of PyYAML's messages is used."
    message = {complaint(write(text)) for text, _ in MISTAKES.values()}
    for sentence in config._SYNTAX_HINTS.values(): assert any(sentence in line for line in message), sentence


def test_at_most_20_mistakes_are_listed(write):
    message = complaint(write("".join(f"key{i}: 1\n" for i in range(5000)))).split("\n")
    assert len(message) == 21 and message[-1] == "c.yaml: 4980 more mistakes"


def test_missing_key(write):
    assert complaint(write("inner:\n"), cls=Demanding) == 'c.yaml: "epochs" is missing; add it'
    assert complaint(write("epochs: null\n"), cls=Demanding) == 'c.yaml, line 1: "epochs" is missing; add it'
    assert load_config(Demanding, write("inner:\n"), {"epochs": 3}).epochs == 3


# ------------------------------------------------------------ paths that are not files

def bind(name):
    with socket.socket(socket.AF_UNIX) as s: s.bind(name)


PLACES = {  # name: (how to make it, what to ask for, pieces)
    "near name": (
        lambda: Path("sft-config.yaml").touch(),
        "sft-confg.yaml",
        ("no configuration sft-confg.yaml", '"sft-config.yaml"?'),
    ),
    "name without its ending": (
        lambda: Path("sft-config.yaml").touch(),
        "sft-config",
        ("no configuration sft-config,", '"sft-config.yaml"?'),
    ),
    "nothing near": (
        lambda: None,
        "zzz.yaml",
        ("no configuration zzz.yaml, neither in the working directory nor in configs/", "check the path"),
    ),
    "no name": (lambda: None, "", ('no configuration ""', "check the path")),
    "directory": (lambda: Path("d").mkdir(), "d", ("d is a directory", "name a YAML file in it")),
    "a run's directory": (
        lambda: (Path("Llama (2M)").mkdir(), Path("Llama (2M)/config.yaml").touch()),
        "Llama (2M)",
        ("Llama (2M) is a directory", 'did you mean "Llama (2M)/config.yaml"?'),
    ),
    "pipe": (lambda: os.mkfifo("p"), "p", ("p is a pipe or a device", "write the configuration into a file")),
    "socket": (lambda: bind("s"), "s", ("s is a pipe or a device",)),
    "endless device": (lambda: None, "/dev/zero", ("/dev/zero is a pipe or a device",)),
    "link to nothing": (lambda: os.symlink("nowhere", "l"), "l", ("no configuration l,",)),
    "link to itself": (lambda: os.symlink("l", "l"), "l", ("no configuration l,",)),
    "file for a folder": (lambda: Path("f").touch(), "f/x.yaml", ("no configuration f/x.yaml",)),
    "zero byte": (lambda: None, "a\0b", (r"no configuration a\x00b",)),
    "line break": (lambda: None, "a\nb", (r"no configuration a\nb",)),
    "not UTF-8": (lambda: None, "caf\udce9", (r"no configuration caf\udce9",)),
    "endless name": (lambda: None, "x" * 5000, ("no configuration xxx", "…")),
}


@pytest.mark.parametrize("case", PLACES)
def test_path_that_is_not_a_file(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    make, path, pieces = PLACES[case]
    make()
    check(complaint(path), [pieces])


def test_line_break_in_file_name(write):
    check(complaint(write("epoch: 1", "a\nb.yaml")), [(r'a\nb.yaml, line 1: "epoch"',)])
    check(complaint(write("", "a\nb.yaml")), [(r"a\nb.yaml is empty",)])


def test_unreadable_files(write, monkeypatch):
    with pytest.raises(
        ConfigError, match="zzz.yaml cannot be read: No such file or directory; check the path"
    ):
        read_yaml("zzz.yaml")
    def refuse(*args): raise PermissionError(13, "Permission denied")
    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(
        ConfigError, match="c.yaml cannot be read: Permission denied; check the path and its perm"
    ):
        read_yaml("c.yaml")


def test_configs_folder(write, caplog):
    caplog.set_level(logging.INFO, "mlx_pretrain")
    write("name: elsewhere", "configs/c.yaml")
    assert load_config(Recipe, "c.yaml").name == "elsewhere"
    assert "c.yaml is not in this directory; reading configs/c.yaml" in caplog.text
    assert complaint("c.yaml", {"epochs": "x"}).startswith("command line: ")
    write("epochs: x", "configs/d.yaml")
    assert complaint("d.yaml").startswith("configs/d.yaml, line 1: ")
    caplog.clear()
    write("name: here")
    assert load_config(Recipe, "c.yaml").name == "here" and not caplog.text


# ------------------------------------------------------------ what is right

VALUES = { # name: (file, dotted key, value)
    "number without a dot": ("optimizer: {learning_rate: 1e-4}", "optimizer.learning_rate", 1e-4),
    "number with capital E": ("optimizer: {learning_rate: 2E-2}", "optimizer.learning_rate", 2e-2),
    "number with plus": ("optimizer: {learning_rate: 1.5e+1}", "optimizer.learning_rate", 15.0),
    "whole number for a float": ("optimizer: {learning_rate: 1}", "optimizer.learning_rate", 1.0),
    "number that starts with a dot": ("optimizer: {learning_rate: .5}", "optimizer.learning_rate", 0.5),
    "underscores": ("epochs: 1_000", "epochs", 1000),
    "leading zero is not octal": ("epochs: 010", "epochs", 10),
    "the largest number": (f"epochs: {2**63 - 1}", "epochs", 2**63 - 1),
    "no is text": ("name: no", "name", "no"),
    "yes is text": ("name: yes", "name", "yes"),
    "off is text": ("data: {special: {pad: off}}", "data.special", {"pad": "off"}),
    "date is text": ("name: 2026-01-31", "name", "2026-01-31"),
    "time is text": ("name: 12:30", "name", "12:30"),
    "hex is text": ("name: 0x1f", "name", "0x1f"),
    "quoted null is text": ("name: 'null'", "name", "null"),
    "tagged text": ("name: !!str 5", "name", "5"),
    "True": ("overwrite: True", "overwrite", True),
    "null is the default": ("epochs: null", "epochs", 1),
    "tilde is the default": ("epochs: ~", "epochs", 1),
    "nothing is the default": ("epochs:", "epochs", 1),
    "an empty section is the default": ("data:\n  # input_file: x\noptimizer:\n", "data.windows.size", 1024),
    "null name is the file's": ("name:\n", "name", "c"),
    "no name is the file's": ("epochs: 2\n", "name", "c"),
    "tuple": ("optimizer: {betas: [1, 2e-1]}", "optimizer.betas", (1.0, 0.2)),
    "path": ("folder: a/b", "folder", Path("a/b")),
    "Windows path": ("data: {input_file: C:\\data\\new.jsonl}", "data.input_file", "C:\\data\\new.jsonl"),
    "format with newlines": ('data: {prompt_format: "### A:\\n{instruction}\\n\\n### B:"}',
                             "data.prompt_format", "### A:\n{instruction}\n\n### B:"),
    "block text": ("data:\n  prompt_format: |\n    a\n\n    {b}\n", "data.prompt_format", "a\n\n{b}\n"),
    "line separator in text": ('name: "a\\u2028b"', "name", "a\u2028b"),
    "emoji as JSON writes it": ('{"name": "\\ud83d\\ude00"}', "name", "😀"),
    "JSON": ('{\n  "data": {"input_file": "a"},\n  "epochs": 3\n}', "epochs", 3),
    "name with brackets": ('name: "Llama (2M)"', "name", "Llama (2M)"),
    "alias": ("name: &n a\ndata: {input_file: *n}", "data.input_file", "a"),
    "byte order mark": ("\ufeffname: a", "name", "a"),
    "Windows line ends": ("epochs: 3\r\nname: a\r\n", "name", "a"),
    "empty mapping": ("{}", "epochs", 1),
    "document mark": ("---\nname: a\n...\n", "name", "a"),
}


@pytest.mark.parametrize("case", VALUES)
def test_value(write, case):
    text, key, value = VALUES[case]
    got = load_config(Recipe, write(text))
    for part in key.split("."): got = getattr(got, part)
    assert got == value and type(got) is (type(value) if not isinstance(value, Path) else type(Path())), got


def test_section():
    cfg = Recipe()
    with pytest.raises(ValidationError): cfg.name = "x"
    with pytest.raises(ValidationError): Recipe(nmae="x")
    with pytest.raises(ValidationError): Optimizer(learning_rate=math.inf)
    with pytest.raises(ValidationError): Recipe(epochs="3")
    assert Windows.model_fields["size"].description == "Tokens in a window."
    # pydantic would swallow a ValueError
    assert issubclass(ConfigError, UserError) and not issubclass(UserError, ValueError)


def test_lines(write):
    values, lines = read_yaml(write("a:\n  b: [1,\n    2]\n'c d': {e: f}\n"))
    assert values == {"a": {"b": [1, 2]}, "c d": {"e": "f"}}
    assert lines == {("a",): 1, ("a", "b"): 2, ("a", "b", 0): 2, ("a", "b", 1): 3, ("c d",): 4,
                     ("c d", "e"): 4}
    with pytest.raises(ConfigError, match="line 2.*already"): read_yaml(write("a: 1\na: 2\n"))


def test_import_is_light():
    heavy = {"matplotlib", "ipywidgets", "tyro", "pandas", "torch", "transformers"}
    code = f"import sys; from mlx_pretrain import config; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          check=True).stdout.strip() == "[]"


# ------------------------------------------------------------ the command line

OVERRIDES = {  # name: (file, overrides, dotted key, value)
    "beats the file": ("epochs: 2", {"epochs": 3}, "epochs", 3),
    "makes a section": ("epochs: 2", {"data.windows.size": 8}, "data.windows.size", 8),
    "fills an empty section": ("data:\n", {"data.windows.size": 8}, "data.windows.size", 8),
    "leaves the siblings": (
        "optimizer: {kind: sgd}",
        {"optimizer.learning_rate": 1e-4},
        "optimizer.kind",
        "sgd",
    ),
    "replaces a bad value": ("epochs: x", {"epochs": 3}, "epochs", 3),
    "replaces a bad list": (
        "optimizer: {betas: [x, y]}",
        {"optimizer.betas": (0.5, 0.6)},
        "optimizer.betas",
        (0.5, 0.6),
    ),
    "none is the default": ("epochs: 2", {"epochs": None}, "epochs", 1),
    "none for the name": ("name: a", {"name": None}, "name", "c"),
    "whole section": (
        "optimizer: {kind: sgd, x: 1}",
        {"optimizer": {"learning_rate": 0.5}},
        "optimizer.kind",
        "adamw",
    ),
    "a path": ("epochs: 2", {"folder": Path("a")}, "folder", Path("a")),
}


@pytest.mark.parametrize("case", OVERRIDES)
def test_override(write, case):
    text, overrides, key, value = OVERRIDES[case]
    got = load_config(Recipe, write(text), overrides)
    for part in key.split("."): got = getattr(got, part)
    assert got == value


BAD_OVERRIDES = {
    "unknown": (
        {"optimizer.learning_rat": 1},
        ['"optimizer.learning_rat" is not a key; did you mean "optimizer.learning_rate"?'],
    ),
    "unknown, without a value": ({"optimizer.learning_rat": None}, ['"optimizer.learning_rat" is not a key']),
    "unknown section": ({"optimiser.kind": "sgd"}, ['"optimiser" is not a key; did you mean "optimizer"?']),
    "of a later stage": ({"resume.checkpoint": "a"}, ['"resume" is not a key; the keys here are']),
    "wrong type": ({"epochs": "3"}, ['"epochs" should be a whole number, not "3"']),
    "nan": (
        {"optimizer.learning_rate": math.nan},
        ['"optimizer.learning_rate" should be a finite number, not NaN'],
    ),
    "too large": ({"epochs": 2**63}, ['"epochs" should be a number below 2**63']),
    "far too large": ({"epochs": 10**5000}, ['"epochs" should be a number below 2**63']),
    "inside a list": ({"optimizer.betas": [0.9, "x"]}, ['"optimizer.betas.1" should be a number, not "x"']),
    "below a value": ({"epochs.x": 1}, ['"epochs.x" cannot be set, because "epochs" is 2 and not a section']),
    "below a wrong section": (
        {"folder.x": 1},
        ['"folder.x" cannot be set, because "folder" is [] and not a section'],
    ),
    "into a list": (
        {"optimizer.betas.0": 1},
        ['"optimizer.betas.0" cannot be set, because "optimizer.betas" is [0.9, 0.9] and not a section'],
    ),
    "inside a section": (
        {"optimizer": {"learning_rat": 1}},
        ['"optimizer.learning_rat" is not a key; did you mean "optimizer.learning_rate"?'],
    ),
    "nothing": (
        {"": 1},
        ['"" is not a key; the keys here are name, overwrite, epochs, folder, data, optimizer'],
    ),
    "not UTF-8": ({"name": "caf\udce9"}, ['"name" is not UTF-8 text; type it again']),
    "several": (
        {"name": 3, "data.input_file": "caf\udce9", "data.windows.size": 1},
        ['"data.input_file" is not', '"name" should be text', '"data.windows.size" should be'],
    ),
}


@pytest.mark.parametrize("case", BAD_OVERRIDES)
def test_bad_override(write, case):
    overrides, sentences = BAD_OVERRIDES[case]
    text = "epochs: 2\noptimizer:\n  betas: [0.9, 0.9]\n" + (
        "folder: []\n" if "folder.x" in overrides else ""
    )
    check(complaint(write(text), overrides), [(f"command line: {sentence}",) for sentence in sentences])


def test_contradiction_is_reported_for_the_override(write):
    check(complaint(write("data: {windows: {size: 8}}\n"), {"data.windows.overlap": 8}),
          [('command line: "data.windows": overlap 8',)])
    check(complaint(write("data: {windows: {size: 8, overlap: 8}}\n"), {"epochs": 8}),
          [('c.yaml, line 1: "data.windows": overlap 8',)])


def test_file_and_command_line_together(write):
    message = complaint(write("epochz: 3\noverwrite: no\n"), {"epochs": 1.5, "data.x": 1})
    check(message, [("c.yaml, line 1", "epochz"), ("c.yaml, line 2", "overwrite"), ("command line", "epochs"),
                 ("command line", "data.x")])


# ------------------------------------------------------------ random input

anything = settings(max_examples=300, deadline=None,
                    suppress_health_check=[HealthCheck.function_scoped_fixture])
GOOD = (b"name: a\noptimizer:\n  learning_rate: 1e-4\n  betas: [0.9, 0.99]\n"
        b"data: {input_file: \"b\\n\", special: {x: 'y'}}\n")


def config_or_sentences(cls, path):
    "`load_config` gives a configuration that survives a round trip, or an error with one line per mistake."
    try: cfg = load_config(cls, path)
    except ConfigError as e:
        assert all(line.startswith(str(path)) and line.isprintable() for line in str(e).split("\n"))
    else:
        dump_yaml(cfg, path)
        assert load_config(cls, path) == cfg


@st.composite
def damaged(draw):
    "A valid file with some bytes replaced by characters with a meaning in YAML."
    data = bytearray(GOOD)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data) - 1))
        data[at:at + draw(st.integers(0,
                                      3))] = draw(st.text("[]{}:-?,&*!|>'\"%@`#~<\n \t\\.0aeNU\x85\u2028",
                                                          max_size=6)).encode()
    return bytes(data) or b"\n"


@anything
@given(st.one_of(st.binary(max_size=200),
                 st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")), damaged(),
                 st.text("[]{}:-?,&*!|>'\"%@`#~<=\n \t\\.0aeNU", max_size=40).map(str.encode)))
def test_random_bytes(tmp_path, data):
    (tmp_path / "c.yaml").write_bytes(data)
    config_or_sentences(Recipe, tmp_path / "c.yaml")


WORDS = ["cosine", "adamw", "gpu", "none", "llama", "../x", "a\nb", "1e-4", "\ud83d"]
scalar = st.one_of(st.none(), st.booleans(), st.integers(-3, 3000), st.integers(10**17, 10**30), st.floats(),
                   st.text(max_size=20), st.sampled_from(WORDS))
value = st.recursive(scalar, lambda v: st.lists(v, max_size=3)
                     | st.dictionaries(st.text(max_size=5), v, max_size=3), max_leaves=5)


def section(cls):
    "Random values for the keys of a section, most of them of the right shape, and sometimes an unknown key."
    keys = {name: section(f.annotation) | value if config._is_section(f.annotation) else value
            for name, f in cls.model_fields.items()}
    return st.fixed_dictionaries({}, optional={**keys, "learning_rat": scalar})


@pytest.mark.long
@anything
@given(section(PretrainConfig), st.booleans())
def test_random_values_with_valid_keys(tmp_path, values, as_json):
    text = json.dumps(values, indent=1) if as_json else yaml.safe_dump(values)
    (tmp_path / "c.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    config_or_sentences(PretrainConfig, tmp_path / "c.yaml")


text = st.one_of(st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
                 st.text("019.eE+-_:~ynofNOtrue\n #'\"\\", max_size=8))
recipes = st.builds(
    Recipe,
    name=text,
    overwrite=st.booleans(),
    epochs=st.integers(1 - 2**63, 2**63 - 1),
    folder=st.sampled_from([None, Path("a b"), Path("1e-4")]),
    data=st.builds(
        Data, input_file=st.none() | text, prompt_format=text, special=st.dictionaries(text, text, max_size=3)
    ),
    optimizer=st.builds(
        Optimizer,
        kind=st.sampled_from(["adamw", "sgd"]),
        learning_rate=st.floats(0, allow_infinity=False, exclude_min=True),
        betas=st.tuples(*[st.floats(allow_nan=False, allow_infinity=False)] * 2),
    ),
)


@anything
@given(recipes)
def test_yaml_roundtrip(tmp_path, cfg):
    dump_yaml(cfg, tmp_path / "config.yaml")
    assert load_config(Recipe, tmp_path / "config.yaml") == cfg
    assert (tmp_path / "config.yaml").read_text(encoding="utf-8") == to_yaml(cfg)


@anything
@given(recipes)
def test_pyyaml_reads_the_same_values(tmp_path, cfg):
    assert yaml.safe_load(to_yaml(cfg)) == cfg.model_dump(mode="json")
