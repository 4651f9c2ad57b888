"config: every bad file gives one sentence a mistake, never a traceback; what is written reads back equal."
import logging
import math
import os
import subprocess
import sys
from pathlib import Path
from time import perf_counter
from typing import Literal

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import Field, ValidationError, model_validator

from mlx_pretrain.config import MAX_BYTES, ConfigError, Section, UserError, dump_yaml, load_config, read_yaml, to_yaml


class Windows(Section):
    size: int = Field(1024, ge=2)
    "Tokens in a window."
    overlap: int = Field(0, ge=0)
    "Tokens that two windows share."

    @model_validator(mode="after")
    def check_overlap(self):
        if self.overlap >= self.size: raise ValueError(f"overlap {self.overlap} must be smaller than size {self.size}")
        return self


class Data(Section):
    input_file: str | None = None
    prompt_format: str = "{instruction}"
    windows: Windows = Windows()
    special: dict[str, str] = {}


class Optimizer(Section):
    kind: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = Field(1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    factor: int | float = 1


class Recipe(Section):
    name: str = ""
    overwrite: bool = False
    epochs: int = 1
    folder: Path | None = None
    data: Data = Data()
    optimizer: Optimizer = Optimizer()


class Demanding(Section):
    epochs: int
    inner: Windows = Windows()


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


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(f"{k}: &{k} [{','.join(['*' + j] * 9)}]\n" for j, k in ("ab", "bc", "cd", "de", "ef", "fg"))

SENTENCES = { # name: (file, all that must be said, in order)
    "unknown key, similar": ("optimizer:\n  learning_rat: 1\n", ['c.yaml, line 2: "optimizer.learning_rat" is not a key; '
                                                                'did you mean "optimizer.learning_rate"?']),
    "unknown key, elsewhere": ("\nlearning_rate: 1\n", ['line 2: "learning_rate" is not a key; did you mean "optimizer.learning_rate"?']),
    "unknown key, similar elsewhere": ("data:\n  windows:\n    learning_rte: 1\n", ['line 3: "data.windows.learning_rte"',
                                                                                    '"optimizer.learning_rate"?']),
    "unknown key, nothing near": ("data:\n  windows: {qqq: 1}\n",
                                  ['line 2: "data.windows.qqq" is not a key; the keys here are size, overlap']),
    "unknown key without a value": ("overwrit:\n", ['line 1: "overwrit" is not a key; did you mean "overwrite"?']),
    "line break in a key": ('"a\\nb": 1\n', ['line 1: "a\\nb" is not a key']),
    "long text": (f"epochs: {'x' * 9999}\n", ['line 1: "epochs" should be a whole number, not "xxx', "…"]),
    "unknown section": ("optimiser:\n  kind: sgd\n", ['line 1: "optimiser" is not a key; did you mean "optimizer"?']),
    "key of digits": ("1: 2\n", ['line 1: "1" is not a key']),
    "merge key": ("data: &d\n  input_file: a\noptimizer:\n  <<: *d\n", ['line 4: "optimizer.<<" is not a key']),
    "text for a number": ("optimizer:\n  learning_rate: fast\n", ['line 2: "optimizer.learning_rate" should be a number, not "fast"']),
    "quoted number": ('epochs: "3"\n', ['line 1: "epochs" should be a whole number, not "3"']),
    "fraction for a whole number": ("epochs: 3.5\n", ['line 1: "epochs" should be a whole number, not 3.5']),
    "true for a number": ("epochs: true\n", ['line 1: "epochs" should be a whole number, not true']),
    "number for text": ("name: 2026\n", ['line 1: "name" should be text, not 2026; put it in quotes']),
    "list for text": ("name: [a]\n", ['line 1: "name" should be text, not ["a"]']),
    "yes for true": ("overwrite: yes\n", ['line 1: "overwrite" should be true or false, not "yes"']),
    "one for true": ("overwrite: 1\n", ['line 1: "overwrite" should be true or false, not 1']),
    "number for a section": ("data: 3\n", ['line 1: "data" should be a section, with keys of its own, not 3']),
    "text for a list": ("optimizer:\n  betas: 0.9\n", ['line 2: "optimizer.betas" should be a list, such as [a, b], not 0.9']),
    "list too short": ("optimizer:\n  betas: [0.9]\n", ['line 2: "optimizer.betas.1" is missing; add it']),
    "list too long": ("optimizer:\n  betas: [0.9, 0.9, 0.9]\n", ['line 2: "optimizer.betas"', "at most 2"]),
    "null in a list": ("optimizer:\n  betas:\n  - 0.9\n  -\n", ['line 4: "optimizer.betas.1" should be a number, not null']),
    "no such choice": ("optimizer: {kind: adam}\n", ["line 1: \"optimizer.kind\" should be 'adamw' or 'sgd', not \"adam\""]),
    "out of range": ("optimizer:\n  learning_rate: -1e-4\n", ['line 2: "optimizer.learning_rate" should be greater than 0, not -0.0001']),
    "two fields at odds": ("data:\n  windows:\n    size: 4\n    overlap: 4\n",
                           ['line 2: "data.windows": overlap 4 must be smaller than size 4']),
    "either type": ("optimizer:\n  factor: a\n",
                    ['line 2: "optimizer.factor" should be a whole number', '"optimizer.factor" should be a number']),
    "nan": ("optimizer: {learning_rate: .nan}\n", ['"optimizer.learning_rate" should be a finite number, not NaN']),
    "inf": ("optimizer: {learning_rate: .inf}\n", ['"optimizer.learning_rate" should be a finite number, not Infinity']),
    "minus inf": ("optimizer: {learning_rate: -.Inf}\n", ['should be a finite number, not -Infinity']),
    "inf by size": ("optimizer: {learning_rate: 1e999}\n", ['should be a finite number, not Infinity']),
    "inf by digits": (f"optimizer: {{learning_rate: {'9' * 400}}}\n", ["should be a finite number, not 999", "…"]),
    "too many digits": (f"epochs: {'9' * 5000}\n", ["line 1:", "cannot be read as int"]),
    "duplicate key": ("name: a\nepochs: 1\nname: b\n", ['c.yaml, line 3: "name" stands on line 1 already; keep one of them']),
    "duplicate in a section": ("data:\n  input_file: a\n  'input_file': a\n", ['line 3: "input_file" stands on line 2 already']),
    "alias bomb": (BOMB, ["more than 10,000 values"]),
    "alias of itself": ("data: &a {data: *a}\n", ["more than 10,000 values"]),
    "alias of itself, twice": ("data: &a [*a, *a]\n", ["more than 10,000 values"]),
    "unknown alias": ("name: *x\n", ["line 1: found undefined alias"]),
    "deep flow": ("a: " + "[" * 50_000, ["line 1: more than 32 levels"]),
    "deep maps": ("a: " + "{a: " * 20_000, ["line 1: more than 32 levels"]),
    "deep block": ("- " * 40_000, ["line 1: more than 32 levels"]),
    "tab": ("data:\n\tinput_file: a\n", ["line 2:", "indent with spaces, not with tabs"]),
    "colon in text": ("name: a: b\n", ["line 1: mapping values are not allowed here; put a text that holds a colon in quotes"]),
    "bad indentation": ("data:\n    input_file: a\n  windows: 3\n", ["line 3:", "check the indentation"]),
    "open quote": ("name: 'a\n\n", ["close the quotation mark"]),
    "open bracket": ("a: [1, 2\n", ["line 2:", "expected ',' or ']'"]),
    "percent": ("name: a\nepochs: %3\n", ["line 2:", "put the text in quotes"]),
    "two documents": ("---\nname: a\n---\nname: b\n", ["line 3:", "keep one document"]),
    "python tag": ("name: !!python/object/apply:os.system [ls]\n", ["line 1: the tag", "take it away"]),
    "unknown tag": ("name: !env HOME\n", ['line 1: the tag "!env" has no meaning here']),
    "wrong tag": ("data: !!seq {a: 1}\n", ["the tag", "take it away"]),
    "bad tagged number": ("epochs: !!int three\n", ['"three" cannot be read as int']),
    "list as key": ("? [a]\n: 1\n", ["line 1: a key must be a plain word"]),
    "bad escape": ('name: "\\U00110000"\n', ["c.yaml is not YAML", "single quotes"]),
    "half a surrogate pair": ('name: "\\ud83d"\n', ["line 1:", "cannot be read as str"]),
    "empty": ("", ["c.yaml is empty; write at least one key"]),
    "comments only": ("# name: a\n", ["is empty"]),
    "only null": ("null\n", ["is empty"]),
    "list at the top": ("- name: a\n", ['must hold keys with values at the top', 'not only [{"name": "a"}]']),
    "text at the top": ("name\n", ["must hold keys with values at the top", 'not only "name"']),
    "latin-1": (b"epochs: 1\nname: caf\xe9\n", ["c.yaml, line 2: byte 0xe9 is not UTF-8; save the file as UTF-8"]),
    "utf-16": ("name: a\n".encode("utf-16"), ["line 1: byte 0xff is not UTF-8"]),
    "control character": ("epochs: 1\nname: a\x07b\n", ["line 2: the control character U+0007 cannot stand in YAML; delete it"]),
    "zero bytes": (b"\0" * 10, ["line 1: the control character U+0000"]),
    "too long": ("#" * (MAX_BYTES + 1), ["is longer than 100,000 bytes; is it a data file by mistake?"]),
}


@pytest.mark.parametrize("case", SENTENCES)
def test_sentence(write, case):
    text, wanted = SENTENCES[case]
    start = perf_counter()
    said = complaint(write(text))
    assert perf_counter() - start < 5
    at = 0
    for part in wanted:
        assert part in said[at:], said
        at = said.index(part, at) + len(part)
    assert all(line.startswith("c.yaml") for line in said.split("\n"))
    assert len(said) < 600


VALUES = { # name: (file, dotted key, value)
    "number without a dot": ("optimizer: {learning_rate: 1e-4}", "optimizer.learning_rate", 1e-4),
    "number with capital E": ("optimizer: {learning_rate: 2E-2}", "optimizer.learning_rate", 2e-2),
    "number with plus": ("optimizer: {learning_rate: 1.5e+1}", "optimizer.learning_rate", 15.0),
    "whole number for a float": ("optimizer: {learning_rate: 1}", "optimizer.learning_rate", 1.0),
    "number that starts with a dot": ("optimizer: {learning_rate: .5}", "optimizer.learning_rate", 0.5),
    "underscores": ("epochs: 1_000", "epochs", 1000),
    "leading zero is not octal": ("epochs: 010", "epochs", 10),
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
    "format with newlines": ('data: {prompt_format: "### A:\\n{instruction}\\n\\n### B:"}',
                             "data.prompt_format", "### A:\n{instruction}\n\n### B:"),
    "block text": ("data:\n  prompt_format: |\n    a\n\n    {b}\n", "data.prompt_format", "a\n\n{b}\n"),
    "line separator in text": ("name: 'a\u2028b'", "name", "a\u2028b"),
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


def test_all_mistakes_in_the_order_of_the_file(write):
    said = complaint(write("epochz: 3\noptimizer:\n  betas: [a, 0.9]\n  kind: 5\nepochs: x\n"), {"overwrite": "ja"}).split("\n")
    assert [line.split(":")[0] for line in said] == ["c.yaml, line 1", "c.yaml, line 3", "c.yaml, line 4", "c.yaml, line 5", "command line"]


def test_very_many_mistakes(write):
    said = complaint(write("".join(f"key{i}: 1\n" for i in range(5000)))).split("\n")
    assert len(said) == 21 and said[-1] == "c.yaml: 4980 more mistakes"


def test_missing_key(write):
    assert complaint(write("inner:\n"), cls=Demanding) == 'c.yaml: "epochs" is missing; add it'
    assert complaint(write("epochs: null\n"), cls=Demanding) == 'c.yaml, line 1: "epochs" is missing; add it'
    assert load_config(Demanding, write("inner:\n"), {"epochs": 3}).epochs == 3


def test_files_that_are_none(write, monkeypatch):
    write("name: a", "sft-config.yaml")
    assert complaint("sft-confg.yaml") == ("there is no configuration sft-confg.yaml, neither from here nor in configs/; "
                                           'did you mean "sft-config.yaml"?')
    assert "check the path" in complaint("zzz.yaml")
    assert "there is no configuration" in complaint("") or "directory" in complaint("")
    Path("d").mkdir()
    assert complaint("d") == "d is a directory; name a YAML file in it"
    write("name: a", "runs/Llama (2M)/config.yaml")
    assert complaint("runs/Llama (2M)") == 'runs/Llama (2M) is a directory; did you mean "runs/Llama (2M)/config.yaml"?'
    for odd in ("a\0b", "x" * 5000, "sft-config.yaml/x"): complaint(odd)
    with pytest.raises(ConfigError, match="No such file"): read_yaml("zzz.yaml")
    if os.path.exists("/dev/zero"): assert "longer than" in complaint("/dev/zero")


def test_unreadable_file(write, monkeypatch):
    def refuse(*args): raise PermissionError(13, "Permission denied")
    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(ConfigError, match="c.yaml cannot be read: Permission denied; check the path"): read_yaml("c.yaml")


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


OVERRIDES = { # name: (file, overrides, dotted key, value)
    "beats the file": ("epochs: 2", {"epochs": 3}, "epochs", 3),
    "makes a section": ("epochs: 2", {"data.windows.size": 8}, "data.windows.size", 8),
    "fills an empty section": ("data:\n", {"data.windows.size": 8}, "data.windows.size", 8),
    "leaves the siblings": ("optimizer: {kind: sgd}", {"optimizer.learning_rate": 1e-4}, "optimizer.kind", "sgd"),
    "heals the file": ("epochs: x", {"epochs": 3}, "epochs", 3),
    "heals a list": ("optimizer: {betas: [x, y]}", {"optimizer.betas": (0.5, 0.6)}, "optimizer.betas", (0.5, 0.6)),
    "none is the default": ("epochs: 2", {"epochs": None}, "epochs", 1),
    "none for the name": ("name: a", {"name": None}, "name", "c"),
    "whole section": ("optimizer: {kind: sgd, x: 1}", {"optimizer": {"learning_rate": 0.5}}, "optimizer.kind", "adamw"),
    "a path": ("epochs: 2", {"folder": Path("a")}, "folder", Path("a")),
}


@pytest.mark.parametrize("case", OVERRIDES)
def test_override(write, case):
    text, overrides, key, value = OVERRIDES[case]
    got = load_config(Recipe, write(text), overrides)
    for part in key.split("."): got = getattr(got, part)
    assert got == value


BAD_OVERRIDES = {
    "unknown": ({"optimizer.learning_rat": 1},
                'command line: "optimizer.learning_rat" is not a key; did you mean "optimizer.learning_rate"?'),
    "unknown section": ({"optimiser.kind": "sgd"}, 'command line: "optimiser" is not a key; did you mean "optimizer"?'),
    "wrong type": ({"epochs": "3"}, 'command line: "epochs" should be a whole number, not "3"'),
    "nan": ({"optimizer.learning_rate": math.nan}, 'command line: "optimizer.learning_rate" should be a finite number, not NaN'),
    "inside a list": ({"optimizer.betas": [0.9, "x"]}, 'command line: "optimizer.betas.1" should be a number, not "x"'),
    "below a value": ({"epochs.x": 1}, 'command line: "epochs.x" cannot be set, because "epochs" is 2 and not a section'),
    "into a list": ({"optimizer.betas.0": 1},
                    'command line: "optimizer.betas.0" cannot be set, because "optimizer.betas" is [0.9, 0.9] and not a section'),
    "inside a section": ({"optimizer": {"learning_rat": 1}}, 'command line: "optimizer.learning_rat" is not a key; '
                                                             'did you mean "optimizer.learning_rate"?'),
    "nothing": ({"": 1}, 'command line: "" is not a key; the keys here are name, overwrite, epochs, folder, data, optimizer'),
    "not UTF-8": ({"name": "caf\udce9"}, "c.yaml: the name of a file or a value from the command line is not UTF-8 text; rename it"),
}


@pytest.mark.parametrize("case", BAD_OVERRIDES)
def test_bad_override(write, case):
    overrides, sentence = BAD_OVERRIDES[case]
    assert complaint(write("epochs: 2\noptimizer:\n  betas: [0.9, 0.9]\n"), overrides) == sentence


def test_section():
    cfg = Recipe()
    with pytest.raises(ValidationError): cfg.name = "x"
    with pytest.raises(ValidationError): Recipe(nmae="x")
    with pytest.raises(ValidationError): Optimizer(learning_rate=math.inf)
    with pytest.raises(ValidationError): Recipe(epochs="3")
    assert Windows.model_fields["size"].description == "Tokens in a window."
    assert issubclass(ConfigError, UserError) and not issubclass(UserError, ValueError) # pydantic would swallow a ValueError


def test_lines(write):
    values, lines = read_yaml(write("a:\n  b: [1,\n    2]\n'c d': {e: f}\n"))
    assert values == {"a": {"b": [1, 2]}, "c d": {"e": "f"}}
    assert lines == {("a",): 1, ("a", "b"): 2, ("a", "b", 0): 2, ("a", "b", 1): 3, ("c d",): 4, ("c d", "e"): 4}


def test_import_is_light():
    heavy = {"matplotlib", "ipywidgets", "tyro", "pandas", "torch", "transformers"}
    code = f"import sys; from mlx_pretrain import config; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


anything = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
GOOD = b"name: a\noptimizer:\n  learning_rate: 1e-4\n  betas: [0.9, 0.99]\ndata: {input_file: \"b\\n\", special: {x: 'y'}}\n"


@st.composite
def damaged(draw):
    "A good file with some bytes replaced by others that mean something to YAML."
    data = bytearray(GOOD)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data) - 1))
        data[at:at + draw(st.integers(0, 3))] = draw(st.text("[]{}:-?,&*!|>'\"%@`#~<\n \t\\.0aeNU\x85\u2028", max_size=6)).encode()
    return bytes(data) or b"\n"


@anything
@given(st.one_of(st.binary(max_size=200), st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")), damaged(),
                 st.text("[]{}:-?,&*!|>'\"%@`#~<=\n \t\\.0aeNU", max_size=40).map(str.encode)))
def test_any_bytes(tmp_path, data):
    path = tmp_path / "c.yaml"
    path.write_bytes(data)
    try: cfg = load_config(Recipe, path)
    except ConfigError as e: assert str(e).strip() and all(line.startswith(str(tmp_path)) for line in str(e).split("\n"))
    else: assert isinstance(cfg, Recipe)


text = st.one_of(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), st.text("019.eE+-_:~ynofNOtrue\n #'\"\\", max_size=8))
recipes = st.builds(
    Recipe, name=text, overwrite=st.booleans(), epochs=st.integers(), folder=st.sampled_from([None, Path("a b"), Path("1e-4")]),
    data=st.builds(Data, input_file=st.none() | text, prompt_format=text, special=st.dictionaries(text, text, max_size=3)),
    optimizer=st.builds(Optimizer, kind=st.sampled_from(["adamw", "sgd"]),
                        learning_rate=st.floats(0, allow_infinity=False, exclude_min=True),
                        betas=st.tuples(*[st.floats(allow_nan=False, allow_infinity=False)] * 2)))


@anything
@given(recipes)
def test_written_and_read_again(tmp_path, cfg):
    dump_yaml(cfg, tmp_path / "config.yaml")
    assert load_config(Recipe, tmp_path / "config.yaml") == cfg
    assert (tmp_path / "config.yaml").read_text(encoding="utf-8") == to_yaml(cfg)


@anything
@given(recipes)
def test_other_programs_read_the_same(tmp_path, cfg):
    assert yaml.safe_load(to_yaml(cfg)) == cfg.model_dump(mode="json")
