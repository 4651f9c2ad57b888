"""Properties of mlx_pretrain.prompt: no template and no row can do harm."""
import pytest
from common import check_sentence, forall
from hypothesis import strategies as st

from mlx_pretrain.config import ConfigError, DataError
from mlx_pretrain.prompt import fill_format, split_format

ALPHABET = st.sampled_from(["{{", "}}", "{a}", "{b c}", "{é}", "text", "\n", " ", "🙂", '"', ":", "!", "."])
VALUES = st.one_of(st.text(max_size=10),
                   st.sampled_from(["{", "}", "{a}", "{{a}}", "{a.__class__}", "%s", "\\n"]))


@forall(300, template=st.lists(ALPHABET, max_size=10).map("".join), a=VALUES, b=VALUES, c=VALUES)
def test_fill_format_equals_str_format(template, a, b, c):
    row = {"a": a, "b c": b, "é": c}
    pieces = split_format(template, "data.prompt_format")
    # only plain names, so that str.format is a valid reference
    assert fill_format(pieces, row) == template.format(**row)
    assert all(name in row for _, name in pieces[:-1])
    assert all(text for text, name in pieces if name is None)


WRONG = st.sampled_from(["{", "}", "{}", "{a", "a}", "{a!r}", "{a:9}", "{a.b}", "{a[0]}", "{ a}"])


@forall(300, template=st.lists(st.one_of(ALPHABET, WRONG), max_size=8).map("".join))
def test_any_template_is_parsed_or_refused(template):
    try: pieces = split_format(template, "data.prompt_format")
    except ConfigError as e: return check_sentence(str(e).replace(". ", ""), '"data.prompt_format"')
    rebuilt = "".join(text.replace("{", "{{").replace("}", "}}") + ("" if name is None else f"{{{name}}}")
                      for text, name in pieces)
    assert rebuilt == template


@pytest.mark.parametrize("attack", [
    "{a.__class__}", "{a[0]}", "{a[b]}", "{a!r}", "{a!s}", "{a:>2000000000}", "{a:{b}}", "{a:{b:{c}}}", "{}",
    "{ }", "{ a}", "{a\n}", "{0.real}", "{", "}", "x{", "}x", "{a", "a}", "{a!}", "{a}}", "{{a}", "{a:",
    '{"json": 1}', "{:x}", "{a:" + "9" * 5000 + "}"])
def test_fields_other_than_plain_names_are_refused(attack):
    with pytest.raises(ConfigError) as error: split_format(f"Question: {attack}", "data.prompt_format")
    check_sentence(str(error.value), 'in "data.prompt_format"; write {name} for a field')


def test_split_and_fill_of_known_templates():
    spec = "### Instruction:\n{instruction}\n\n### Response:"
    assert split_format(spec, "k") == [("### Instruction:\n", "instruction"), ("\n\n### Response:", None)]
    assert split_format("{a}{b}", "k") == [("", "a"), ("", "b")]
    assert split_format("", "k") == [] and split_format("{{}}", "k") == [("{}", None)]
    for row, part in (
        ({}, 'there is no field "a"; the row has no field'),
        ({"a": 3}, '"a" must be a string, found a number'),
    ):
        with pytest.raises(DataError) as error: fill_format([("", "a")], row)
        check_sentence(str(error.value), part)
