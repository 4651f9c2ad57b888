"Nothing that a row, a key or a flag says is lost in silence, and what a sentence advises helps when it is followed."
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from common import check_sentence

import mlx_pretrain  # noqa: F401 (before MLX)
from mlx_pretrain.chat import ask_pieces, read_messages, row_pieces, template_keys, unread_keys
from mlx_pretrain.config import ConfigError, DataError, UserError, load_config, where_from
from mlx_pretrain.data import DataConfig, cached_windows, make_tokenizer, pack
from mlx_pretrain.jsonl import read_jsonl
from mlx_pretrain.prompts import read_prompts
from mlx_pretrain.preferences import read_preferences, split_conversations
from mlx_pretrain.pretrained import PretrainedError, load
from mlx_pretrain.prompt import PromptFormat
from mlx_pretrain.rows import PromptConfig, read_examples, read_first_row, resolve_format
from mlx_pretrain.sft import SFTConfig
from mlx_pretrain.stage import data_file
from mlx_pretrain.tokenizer import ByteTokenizer
from mlx_pretrain.user_code import load_object

CHATML = ("{% for m in messages %}{{ '<bos>' + m['role'] + ':' + m.content + '<eos>' }}{% endfor %}"
          "{% if add_generation_prompt %}<bos>assistant:{% endif %}")


class Chat(ByteTokenizer):
    "Bytes with a chat template."
    chat_template = CHATML


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLX_PRETRAIN_CACHE", str(tmp_path / "cache"))


def write(rows, name="rows.jsonl"):
    Path(name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
                          encoding="utf-8")
    return name


def message(role, content, **more): return {"role": role, "content": content, **more}


ASK, ANSWER = message("user", "Who?"), message("assistant", "Me.")
TALK, PAIR = [ASK, ANSWER], {"instruction": "Who?", "response": "Me."}


def trained(rows, tok=None, inherited=None, **keys):
    "What a file of rows becomes with some keys of `data`: prompt and response of the first row, as text."
    tok, cfg = tok or ByteTokenizer(), PromptConfig(**keys)
    fmt = resolve_format(cfg, read_first_row(write(rows), cfg), inherited)
    examples = read_examples("rows.jsonl", tok, fmt, 4000, on_bad_row=cfg.on_bad_row,
                             preprocess=cfg.preprocess)
    return "".join(map(tok.piece, examples[0].ids))


# What is not read


def test_a_column_that_nobody_reads_is_told_once_and_the_remedy_has_it_read(caplog):
    rows = [{**PAIR, "context": "Mara sold the boat.", "category": "qa", "id": 7, "score": 0.5,
             "empty": ""}] * 3
    assert "Mara" not in trained(rows)
    [said] = [r.message for r in caplog.records]
    check_sentence(said, "rows.jsonl", '"context" (3 rows), "category" (3 rows)')
    assert not {'"id"', '"score"', '"empty"'} & {*said.split()}
    key, value = re.search(r'"data\.(input_field_optional): (\w+)"', said).groups()
    assert "Mara sold" in trained(rows, **{key: value})
    place = re.search(r"write (\{\w+\}) in", said)[1]
    caplog.clear()
    assert "Mara sold" in trained(rows, prompt_format=f"{{instruction}} {place} {{category}}")
    assert not caplog.records


@pytest.mark.parametrize("row, keys, parts", [
    ({**PAIR, "input": "1, 2", "text": "Below is an instruction."}, {}, ['"input" (1 row), "text"', '"data.input_field_optional: input"']),
    ({**PAIR, "history": [["Hi", "Ho"]]}, {}, ['"history" (1 row)', "data.preprocess"]),
    ({**PAIR, "tools": [{"name": "f"}]}, {}, ['"tools" (1 row)']),
    ({**PAIR, "passage": "p", "input": "i"}, {"input_field_optional": "input"}, ['"passage"', "write {passage} in"]),
    ({**PAIR, "input": "i"}, {"input_field_optional": "inptu"}, ['"data.input_field_optional: input"', 'no row has the column "inptu"']),
    ({**PAIR, "system": "s"}, {"system_field": "sytem"}, ['no row has the column "sytem"; check "data.system_field"', '"system" (1 row)']),
    ({"messages": TALK, "context": "c"}, {}, ['"context" (1 row)', "data.preprocess"]),
    ({"messages": TALK, "context": "c"}, {"input_field_optional": "context"}, ['"context" (1 row)', "data.preprocess"]),
    ({"messages": TALK, "system": "s"}, {}, ['set "data.system_field: system" if that is a system prompt']),
    ({"messages": [ASK, {**ANSWER, "thinking": "Hm."}]}, {}, ['keys that the prompt format does not read: "thinking" (1 row)']),
    ({"question": "q", "context": "c", "answer": "a"}, {"prompt_format": "{question}", "output_field": "answer"}, ['"context" (1 row)']),
])
def test_what_is_not_read_is_named(caplog, row, keys, parts):
    trained([row], **keys)
    said = "\n".join(record.message for record in caplog.records)
    for part in parts: assert part in said, (part, said)


def test_who_has_a_function_has_read_all(caplog):
    Path("mine.py").write_text("def f(row): return row\n")
    trained([{**PAIR, "context": "c"}], preprocess="mine.py:f")
    trained([{"text": "The gull flies.", "url": "http://x", "title": "Gulls"}])
    assert not caplog.records


def test_prompts_and_preferences_are_looked_at_too(caplog):
    tok, fmt = ByteTokenizer(), PromptFormat(prompt_format="{instruction}")
    read_prompts(write([{**PAIR, "context": "c", "reward": 1}]), tok, fmt, 100, 4, reward_field="reward")
    read_preferences(write([{"instruction": "?", "chosen": "a<eos>", "rejected": "b", "margin": 1,
                             "topic": "t"}]), tok, fmt, 100)
    said = "\n".join(record.message for record in caplog.records)
    assert (
        len(caplog.records) == 3
        and '"context" (1 row)' in said
        and '"topic" (1 row)' in said
        and '"chosen" spells <eos>' in said
    )
    assert '"reward"' not in said and '"margin"' not in said


def test_keys_of_messages_reach_the_template_or_are_told():
    thinks = [ASK, {**ANSWER, "reasoning_content": "Hm.", "name": "Ole", "tool_calls": None}]
    by_template = PromptFormat(prompt_format=None)
    assert read_messages(thinks)[1] == {**ANSWER, "trained": True, "reasoning_content": "Hm.", "name": "Ole"}
    tok = Chat()
    assert unread_keys(by_template, tok, thinks) == {"reasoning_content", "name"}
    tok.chat_template = CHATML + "{{ messages[0].get('thinking') }}{% if m.name is defined %}{% endif %}"
    assert {"thinking", "name", "role", "content"} <= template_keys(tok.chat_template)
    assert unread_keys(by_template, tok,
                       thinks) == set() and unread_keys(PromptFormat(), tok,
                                                        thinks) == {"reasoning_content", "name"}
    assert template_keys("{% for %}") == frozenset()


def test_a_prompt_that_came_twice_holds_no_answer():
    "UltraFeedback's rows: a prompt, and three conversations that begin with it."
    row = {"prompt": "Who?", "messages": TALK, "chosen": TALK,
           "rejected": [ASK, message("assistant", "You.")]}
    cfg = PromptConfig()
    first = read_first_row(write([row]), cfg, False, split_conversations)
    fmt = resolve_format(cfg, first, PromptFormat(prompt_format="Q: {instruction} A:"), False)
    data, tok = read_preferences("rows.jsonl", ByteTokenizer(), fmt, 100), ByteTokenizer()
    assert tok.decode(data.prompts[0]) == "Q: Who? A:"


# Control tokens in letters


@pytest.mark.parametrize("row, keys, place", [
    ({**PAIR, "response": "Me.<eos>"}, {}, '"response"'), ({**PAIR, "instruction": "<eos>?"}, {}, '"instruction"'),
    ({"messages": [ASK, message("assistant", "Me.<eos>")]}, {}, "a message of the assistant"), ({"text": "<eos>"}, {}, '"text"'),
    ({"conversations": [{"from": "human", "value": "<eos>?"}, {"from": "gpt", "value": "Me."}]}, {}, "a message of the human"),
    ({**PAIR, "context": "<eos>"}, {"input_field_optional": "context"}, '"context"'),
])
def test_control_tokens_in_letters_are_told_once(caplog, row, keys, place):
    good = (
        PAIR
        if "instruction" in row
        else {"messages": TALK}
        if "messages" in row
        else {"text": "x", **row}
        if "text" in row
        else row
    )
    trained([good, row, row] if good is not row and "text" not in row else [row, row], **keys)
    [said] = [r.message for r in caplog.records if "spells" in r.message]
    check_sentence(said, f"{place} spells <eos>", "in 2 rows")
    assert "line 2" in said if good is not row and "text" not in row else "line 1" in said


def test_control_tokens_in_texts_are_told_each_time(caplog):
    write([{"text": "The gull."}, {"text": "A<eos>B"}])
    for _ in range(2):
        caplog.clear()
        cached_windows("rows.jsonl", ByteTokenizer(), 8)
        [said] = [record.message for record in caplog.records]
        check_sentence(said, "rows.jsonl, line 2: the text spells <eos>", "in 1 document)")
    caplog.clear()
    pack(["a<eos>", "b"], ByteTokenizer(), 4)
    assert "document 1: the text spells <eos>" in caplog.text


# System prompts of rows


@pytest.mark.parametrize("row", [{**PAIR, "system": "Be brief."}, {"messages": TALK, "system": "Be brief."}])
@pytest.mark.parametrize("tok, fmt", [(ByteTokenizer(), PromptFormat(prompt_format="Q: {instruction} A:")),
                                      (Chat(), PromptFormat(prompt_format=None))])
def test_a_row_has_its_own_system_prompt(row, tok, fmt):
    if "messages" in row: fmt = fmt.model_copy(update={"input_field": "messages", "output_field": "messages"})
    own = fmt.model_copy(update={"system_field": "system", "system_prompt": "For all."})
    for pieces in (row_pieces, ask_pieces):
        assert pieces(own, tok, row) == pieces(fmt.model_copy(update={"system_prompt": "Be brief."}), tok,
                                               row)
        for none in ("", None, " "):
            assert pieces(own, tok, {**row, "system": none}) == pieces(
                fmt.model_copy(update={"system_prompt": "For all."}), tok, row
            )
        with pytest.raises(DataError, match='"system" must be a string'): pieces(own, tok, {**row, "system": 5})
    if "messages" in row:
        with pytest.raises(DataError, match="keep one of them"):
            row_pieces(own, tok, {**row, "messages": [message("system", "x"), *TALK]})


def test_an_older_format_is_read():
    assert PromptFormat.model_validate_json('{"prompt_format": "{instruction}"}').system_field is None
    assert resolve_format(PromptConfig(system_field="s"),
                          read_first_row(write([{**PAIR, "s": "x"}]), PromptConfig())).system_field == "s"


# Formats


@pytest.mark.parametrize("key", ["prompt_format", "response_format", "system_prompt"])
@pytest.mark.parametrize("letter, what", [("n", "line break"), ("t", "tab")])
def test_a_backslash_and_a_letter_is_told_and_double_quotes_help(caplog, key, letter, what):
    text = {"prompt_format": "Q {instruction}", "response_format": "{response}",
            "system_prompt": "s"}[key] + "\\" + letter
    for quote, told in (("'", True), ('"', False), ("", True)):
        caplog.clear()
        Path("run.yaml").write_text(f"data:\n  {key}: {quote}So {text}{quote}\n")
        cfg = load_config(SFTConfig, "run.yaml")
        resolve_format(cfg.data, read_first_row(write([PAIR]), cfg.data))
        assert [f'"data.{key}"' in r.message and what in r.message
                for r in caplog.records] == [True] * told, (quote, caplog.text)


# Conversations


def test_conversations_as_others_write_them():
    turns = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Who?"},
             {"from": "gpt", "value": "Me."}]
    plain = {"messages": [message("system", "Be brief."), *TALK]}
    want = trained([plain])
    assert trained([{"conversations": turns}]) == trained([{"conversations": plain["messages"]}]) == want
    assert (
        trained([{"talk": turns}], input_field="talk")
        == trained(
            [{"messages": [message("human", "Who?"), message("gpt", "Me.")]}], system_prompt="Be brief."
        )
        == want
    )
    assert trained([{"messages": [{**m, "name": None, "tool_calls": None} for m in plain["messages"]],
                     "tools": "[]"}]) == want
    assert trained([{"messages": plain["messages"], "tools": []}]) == want


@pytest.mark.parametrize("messages, part", [
    ([message("developer", "x"), *TALK], "message 1 has the role 'developer'"),
    ([ASK, message("tool", "4"), ANSWER], "message 2 has the role 'tool'"),
    ([{"from": "bing", "value": "x"}, *TALK], "has the role 'bing'; it must be system, user or assistant, or human or gpt"),
    ([message("user", [{"type": "image"}, {"type": "text", "text": "?"}]), ANSWER], "has a part of the type 'image'"),
    ([ASK, message("assistant", None)], "message 2 has no text as its content, but null"),
    (json.dumps(TALK), "found a string; give each a role and a content, which `json.loads`"),
    ({"role": "user"}, "found an object"),
])
def test_what_is_wrong_with_messages_is_named(messages, part):
    with pytest.raises(DataError, match=re.escape(part)): trained([{"messages": messages}])


# What a sentence advises


REMEDIES = [  # rows, keys, a part of the sentence, keys that follow it (or new rows)
    (
        [{"question": "Who?", "answer": "Me."}],
        {},
        "name the columns of question and answer",
        {"input_field": "question", "output_field": "answer"},
    ),
    (
        [{"question": "Who?", "answer": "Me."}],
        {"input_field": "qestion", "output_field": "answer"},
        'did you mean "question"?',
        {"input_field": "question", "output_field": "answer"},
    ),
    (
        [{"prompt": "Who?", "answer": "Me."}],
        {"output_field": "anwser"},
        'did you mean "answer"?',
        {"output_field": "answer"},
    ),
    (
        [{"instruction": "Who?", "Response": "Me."}],
        {"output_field": "response"},
        'did you mean "Response"?',
        {"output_field": "Response"},
    ),
    ([{"dialog": TALK}], {}, 'in "data.input_field"', {"input_field": "dialog"}),
    (
        [{**PAIR, "context": "c"}],
        {"prompt_format": "{instruction} {contxt}"},
        'did you mean "context"?',
        {"prompt_format": "{instruction} {context}"},
    ),
    (
        [{**PAIR, "system_prompt": "s"}],
        {"prompt_format": "{system_prompt} {instruction}"},
        "data.system_field",
        {"prompt_format": "{system_prompt} {instruction}", "system_field": "system_prompt"},
    ),
    (
        [{"messages": TALK, "context": "c"}],
        {"prompt_format": "{context} {instruction}"},
        "take it out",
        {"prompt_format": "{instruction}"},
    ),
    (
        [{"messages": TALK}],
        {"prompt_format": "Hello"},
        "has no {instruction}, which is where the messages of the user go; add it",
        {"prompt_format": "Hello {instruction}"},
    ),
    ([{"text": "t", "label": "x"}], {"input_field_optional": "label"}, "leave it out", {}),
    ([{"messages": json.dumps(TALK)}], {}, "json.loads", {"preprocess": "mine.py:unpack"}),
    (
        [{"messages": TALK, "tools": [{"name": "f"}]}],
        {},
        'as "data.preprocess" can',
        {"preprocess": "mine.py:no_tools"},
    ),
    (
        [{"chosen": "Human: Who? Assistant: Me.", "rejected": "…"}],
        {},
        'in "data.input_field"',
        {"preprocess": "mine.py:split"},
    ),
]
MINE = ("import json\ndef unpack(row): return {'messages': json.loads(row['messages'])}\n"
        "def no_tools(row): return {'messages': row['messages']}\n"
        "def split(row): return dict(zip(('prompt', 'response'), row['chosen'].split(' Assistant: ')))\n")


@pytest.mark.parametrize("rows, keys, part, followed", REMEDIES, ids=[part[:40] for _, _, part, _ in REMEDIES])
def test_what_a_sentence_advises_helps(rows, keys, part, followed):
    Path("mine.py").write_text(MINE)
    with pytest.raises(UserError) as error: trained(rows, **keys)
    assert part in str(error.value), error.value
    assert trained(rows, **followed)


# Files of another form


TWO = [{"instruction": "Name a bird, please.", "response": 'A "gull"\nor two.'},
       {"instruction": "Ünd?", "response": "No."}]
FORMS = {  # name: (content, what the file is called in the sentence, what is read after the command)
    "array.json": (json.dumps(TWO, indent=4), "one JSON array", TWO),
    "one line.json": (json.dumps(TWO), "one JSON array", TWO),
    "texts.json": (json.dumps(["a", "b"]), "one JSON array", [{"text": "a"}, {"text": "b"}]),
    "spread.jsonl": ("\n".join(json.dumps(row, indent=2) for row in TWO), "spread over several lines", TWO),
    "joined.jsonl": ("".join(map(json.dumps, TWO)), "several objects on one line", TWO),
    "nested.json": (json.dumps({"version": 2, "rows": TWO}, indent=1), 'a list of rows in "rows"', TWO),
    "rows.csv": (
        'instruction,response\n"Name a bird, please.","A ""gull""\nor two."\nÜnd?,No.\n',
        "a table (CSV)",
        TWO,
    ),
    "rows.tsv": ("instruction\tresponse\nÜnd?\tNo.\n", "a table (with '\\t' between cells)", TWO[1:]),
    "table.txt": ("instruction;response\nÜnd?;No.\n", "a table (with ';' between cells)", TWO[1:]),
    "it's.txt": (
        "The gull\nflies.\n\nThe boat waits.\n",
        "plain text",
        [{"text": "The gull\nflies."}, {"text": "The boat waits.\n"}],
    ),
    "wide.jsonl": (
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in TWO).encode("utf-16"),
        "a UTF-16 file",
        TWO,
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_good_file_of_another_form_is_named_and_the_command_makes_rows_of_it(name):
    content, what, rows = FORMS[name]
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as error: list(read_jsonl(name))
    said = str(error.value)
    check_sentence(said, name, what)
    assert "not valid JSON" not in said
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(re.search("`(.*)`", said)[1], shell=True, check=True, env={**os.environ, "PATH": path},
                   executable="/bin/bash")
    new = re.search(r"and give (.*)$", said)[1]
    assert [row.value for row in read_jsonl(new)] == rows and Path(name).exists()


def test_other_files_are_known_by_their_beginning():
    for name, content, part in (
        ("a.gz", b"\x1f\x8b\x08", "`gunzip < a.gz > a`"), ("a.parquet", b"PAR1\x15", "pandas.read_parquet"),
        ("a.zip", b"PK\x03\x04 x", "`unzip a.zip`"),
        ("a.xlsx", b"PK\x03\x04 xl/workbook.xml", "pandas.read_excel"), ("a.jsonl", b"<!DOCTYPE html><html>", "is a web page"),
        ("b.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "`git lfs pull`"),
        ("c.csv", b"a,b\ncaf\xe9,x\n", "is not UTF-8 (byte 0xe9)")):
        Path(name).write_bytes(content)
        with pytest.raises(DataError) as error: list(read_jsonl(name))
        check_sentence(str(error.value), part)


@pytest.mark.parametrize("first", ['{"instruction": "cut', "{'instruction': 'x'}", "7", '"text"', "garbage", "[1"])
def test_a_bad_first_row_is_a_bad_row(first):
    Path("rows.jsonl").write_text(first + "\n" + json.dumps(PAIR) + "\n")
    with pytest.raises(DataError, match="^rows.jsonl, line 1: "): list(read_jsonl("rows.jsonl"))
    assert read_examples("rows.jsonl", ByteTokenizer(), PromptFormat(), 100,
                         on_bad_row="skip").source["skipped"] == 1


# Adapters and paths


def test_adapters_of_others_come_with_the_command():
    mlx = {"model": "base", "fine_tune_type": "lora"}
    peft = {"peft_type": "LORA", "base_model_name_or_path": "org/base"}
    fuse = "`mlx_lm.fuse --model base --adapter-path mlx --save-path mlx-merged`"
    for name, about, part in (("mlx", mlx, fuse), ("peft", peft, "merge_and_unload")):
        Path(name).mkdir()
        Path(name, "adapter_config.json").write_text(json.dumps(about))
        with pytest.raises(PretrainedError) as error: load(name)
        check_sentence(str(error.value), part, f"and give {name}-merged")
        assert about.get("base_model_name_or_path", "base") in str(error.value)


def test_a_file_beside_the_configuration_is_found_for_the_sentence(monkeypatch):
    Path("proj").mkdir()
    Path("else").mkdir()
    write([PAIR], "proj/rows.jsonl")
    Path("proj/mine.py").write_text("def f(row): return row\n")
    Path("proj/sft.yaml").write_text("data: {input_file: rows.jsonl}\n")
    monkeypatch.chdir("else")
    cfg = load_config(SFTConfig, "../proj/sft.yaml")
    with pytest.raises(ConfigError) as error: data_file(cfg.data, "input_file")
    check_sentence(str(error.value), "give ../proj/rows.jsonl", "working directory")
    assert data_file(load_config(SFTConfig, "../proj/sft.yaml",
                                 {"data.input_file": "../proj/rows.jsonl"}).data, "input_file")
    Path("../proj/tok").mkdir()
    with pytest.raises(DataError, match="give ../proj/tok"): make_tokenizer(DataConfig(tokenizer_path="tok"))
    with pytest.raises(DataError, match="give ../proj/mine.py"): load_object("mine.py:f", "data.preprocess")
    with pytest.raises(PretrainedError, match="sft.yaml does not exist; give ../proj/sft.yaml"):
        load("sft.yaml")
    assert where_from("nowhere") == where_from("/rows.jsonl") == "check the path"


def test_the_home_directory_is_known_everywhere(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("mine.py").write_text("def f(row): return {'instruction': 'home', 'response': 'x'}\n")
    assert "home" in trained([PAIR], preprocess="~/mine.py:f")
    assert load_object("~/mine.py:f", "reward_model")({})["instruction"] == "home"
