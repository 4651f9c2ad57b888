"Nothing in a row, a key or a flag is ignored silently, and the remedy that a message proposes works."
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from common import check_sentence

import mlx_pretrain  # noqa: F401 (before MLX)
from mlx_pretrain.chat import prompt_pieces, read_messages, row_pieces, template_keys, unread_keys
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
    "The first row of a file in tokens, as text, with these keys of `data`."
    tok, cfg = tok or ByteTokenizer(), PromptConfig(**keys)
    fmt = resolve_format(cfg, read_first_row(write(rows), cfg), inherited)
    examples = read_examples("rows.jsonl", tok, fmt, 4000, on_bad_row=cfg.on_bad_row,
                             preprocess=cfg.preprocess)
    return "".join(map(tok.piece, examples[0].ids))


# Unread columns and keys


def test_an_unread_column_is_reported_once_and_the_remedy_works(caplog):
    rows = [{**PAIR, "context": "Mara sold the boat.", "category": "qa", "id": 7, "score": 0.5,
             "empty": ""}] * 3
    assert "Mara" not in trained(rows)
    [message] = [record.message for record in caplog.records]
    check_sentence(message, "rows.jsonl", '"context" (3 rows), "category" (3 rows)')
    assert not {'"id"', '"score"', '"empty"'} & {*message.split()}
    key, value = re.search(r'"data\.(input_field_optional): (\w+)"', message).groups()
    assert "Mara sold" in trained(rows, **{key: value})
    field = re.search(r"write (\{\w+\}) in", message)[1]
    caplog.clear()
    assert "Mara sold" in trained(rows, prompt_format=f"{{instruction}} {field} {{category}}")
    assert not caplog.records


@pytest.mark.parametrize("row, keys, parts", [
    ({**PAIR, "input": "1, 2", "text": "Below is an instruction."}, {},
     ['"input" (1 row), "text"', '"data.input_field_optional: input"']),
    ({**PAIR, "history": [["Hi", "Ho"]]}, {}, ['"history" (1 row)', "data.preprocess"]),
    ({**PAIR, "tools": [{"name": "f"}]}, {}, ['"tools" (1 row)']),
    ({**PAIR, "passage": "p", "input": "i"}, {"input_field_optional": "input"},
     ['"passage"', "write {passage} in"]),
    ({**PAIR, "input": "i"}, {"input_field_optional": "inptu"},
     ['"data.input_field_optional: input"', 'no row has the column "inptu"']),
    ({**PAIR, "system": "s"}, {"system_field": "sytem"},
     ['no row has the column "sytem"; check "data.system_field"', '"system" (1 row)']),
    ({"messages": TALK, "context": "c"}, {}, ['"context" (1 row)', "data.preprocess"]),
    ({"messages": TALK, "context": "c"}, {"input_field_optional": "context"},
     ['"context" (1 row)', "data.preprocess"]),
    ({"messages": TALK, "system": "s"}, {}, ['set "data.system_field: system" if that is a system prompt']),
    ({"messages": [ASK, {**ANSWER, "thinking": "Hm."}]}, {},
     ['keys that the prompt format does not read: "thinking" (1 row)']),
    ({"question": "q", "context": "c", "answer": "a"},
     {"prompt_format": "{question}", "output_field": "answer"}, ['"context" (1 row)']),
])
def test_unread_columns_and_keys_are_named(caplog, row, keys, parts):
    trained([row], **keys)
    messages = "\n".join(record.message for record in caplog.records)
    for part in parts: assert part in messages, (part, messages)


def test_no_report_for_preprocessed_rows_and_plain_texts(caplog):
    Path("mine.py").write_text("def f(row): return row\n")
    trained([{**PAIR, "context": "c"}], preprocess="mine.py:f")
    trained([{"text": "The gull flies.", "url": "http://x", "title": "Gulls"}])
    assert not caplog.records


def test_prompts_and_preferences_report_unread_columns(caplog):
    tok, fmt = ByteTokenizer(), PromptFormat(prompt_format="{instruction}")
    read_prompts(write([{**PAIR, "context": "c", "reward": 1}]), tok, fmt, 100, 4, reward_field="reward")
    read_preferences(write([{"instruction": "?", "chosen": "a<eos>", "rejected": "b", "margin": 1,
                             "topic": "t"}]), tok, fmt, 100)
    messages = "\n".join(record.message for record in caplog.records)
    assert len(caplog.records) == 3
    assert '"context" (1 row)' in messages and '"topic" (1 row)' in messages
    assert '"chosen" contains <eos> as text' in messages
    assert '"reward"' not in messages and '"margin"' not in messages


def test_message_keys_reach_the_template_or_are_reported():
    thinks = [ASK, {**ANSWER, "reasoning_content": "Hm.", "name": "Ole", "tool_calls": None}]
    by_template = PromptFormat(prompt_format=None)
    assert read_messages(thinks)[1] == {**ANSWER, "trained": True, "reasoning_content": "Hm.", "name": "Ole"}
    tok = Chat()
    assert unread_keys(by_template, tok, thinks) == {"reasoning_content", "name"}
    tok.chat_template = CHATML + "{{ messages[0].get('thinking') }}{% if m.name is defined %}{% endif %}"
    assert {"thinking", "name", "role", "content"} <= template_keys(tok.chat_template)
    assert unread_keys(by_template, tok, thinks) == set()
    assert unread_keys(PromptFormat(), tok, thinks) == {"reasoning_content", "name"}
    assert template_keys("{% for %}") == frozenset()


def test_a_repeated_prompt_contains_no_answer():
    "UltraFeedback's rows: a prompt, and three conversations that begin with it."
    row = {"prompt": "Who?", "messages": TALK, "chosen": TALK,
           "rejected": [ASK, message("assistant", "You.")]}
    cfg = PromptConfig()
    first = read_first_row(write([row]), cfg, False, split_conversations)
    fmt = resolve_format(cfg, first, PromptFormat(prompt_format="Q: {instruction} A:"), False)
    data, tok = read_preferences("rows.jsonl", ByteTokenizer(), fmt, 100), ByteTokenizer()
    assert tok.decode(data.prompts[0]) == "Q: Who? A:"


# Special tokens written as text


@pytest.mark.parametrize("row, keys, place", [
    ({**PAIR, "response": "Me.<eos>"}, {}, '"response"'),
    ({**PAIR, "instruction": "<eos>?"}, {}, '"instruction"'),
    ({"messages": [ASK, message("assistant", "Me.<eos>")]}, {}, "a message of the assistant"),
    ({"text": "<eos>"}, {}, '"text"'),
    ({"conversations": [{"from": "human", "value": "<eos>?"}, {"from": "gpt", "value": "Me."}]}, {},
     "a message of the human"),
    ({**PAIR, "context": "<eos>"}, {"input_field_optional": "context"}, '"context"'),
])
def test_special_tokens_in_rows_are_reported_once(caplog, row, keys, place):
    good = [PAIR] if "instruction" in row else [{"messages": TALK}] if "messages" in row else []
    trained([*good, row, row], **keys)
    [message] = [r.message for r in caplog.records if "as text" in r.message]
    check_sentence(message, f"{place} contains <eos> as text", "in 2 rows", f"line {len(good) + 1}")


def test_special_tokens_in_texts_are_reported_each_time(caplog):
    write([{"text": "The gull."}, {"text": "A<eos>B"}])
    for _ in range(2):
        caplog.clear()
        cached_windows("rows.jsonl", ByteTokenizer(), 8)
        [message] = [record.message for record in caplog.records]
        check_sentence(message, "rows.jsonl, line 2: the text contains <eos> as text", "in 1 document)")
    caplog.clear()
    pack(["a<eos>", "b"], ByteTokenizer(), 4)
    assert "document 1: the text contains <eos> as text" in caplog.text


# System prompts of rows


@pytest.mark.parametrize("row", [{**PAIR, "system": "Be brief."}, {"messages": TALK, "system": "Be brief."}])
@pytest.mark.parametrize("tok, fmt", [(ByteTokenizer(), PromptFormat(prompt_format="Q: {instruction} A:")),
                                      (Chat(), PromptFormat(prompt_format=None))])
def test_system_prompt_of_a_row(row, tok, fmt):
    if "messages" in row: fmt = fmt.model_copy(update={"input_field": "messages", "output_field": "messages"})
    own = fmt.model_copy(update={"system_field": "system", "system_prompt": "For all."})
    for pieces in (row_pieces, prompt_pieces):
        assert pieces(own, tok, row) == pieces(fmt.model_copy(update={"system_prompt": "Be brief."}), tok,
                                               row)
        for none in ("", None, " "):
            assert pieces(own, tok, {**row, "system": none}) == pieces(
                fmt.model_copy(update={"system_prompt": "For all."}), tok, row
            )
        with pytest.raises(DataError, match='"system" must be a string'):
            pieces(own, tok, {**row, "system": 5})
    if "messages" in row:
        with pytest.raises(DataError, match="keep one of them"):
            row_pieces(own, tok, {**row, "messages": [message("system", "x"), *TALK]})


def test_a_format_without_system_field_is_read():
    assert PromptFormat.model_validate_json('{"prompt_format": "{instruction}"}').system_field is None
    assert resolve_format(PromptConfig(system_field="s"),
                          read_first_row(write([{**PAIR, "s": "x"}]), PromptConfig())).system_field == "s"


# Formats


@pytest.mark.parametrize("key", ["prompt_format", "response_format", "system_prompt"])
@pytest.mark.parametrize("letter, what", [("n", "line break"), ("t", "tab")])
def test_an_escape_that_stays_text_is_reported_and_double_quotes_help(caplog, key, letter, what):
    text = {"prompt_format": "Q {instruction}", "response_format": "{response}",
            "system_prompt": "s"}[key] + "\\" + letter
    for quote, is_reported in (("'", True), ('"', False), ("", True)):
        caplog.clear()
        Path("run.yaml").write_text(f"data:\n  {key}: {quote}So {text}{quote}\n")
        cfg = load_config(SFTConfig, "run.yaml")
        resolve_format(cfg.data, read_first_row(write([PAIR]), cfg.data))
        assert [f'"data.{key}"' in r.message and what in r.message
                for r in caplog.records] == [True] * is_reported, (quote, caplog.text)


# Conversations


def test_forms_of_conversations():
    turns = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Who?"},
             {"from": "gpt", "value": "Me."}]
    plain = {"messages": [message("system", "Be brief."), *TALK]}
    want = trained([plain])
    assert trained([{"conversations": turns}]) == trained([{"conversations": plain["messages"]}]) == want
    assert trained([{"talk": turns}], input_field="talk") == want
    human = [message("human", "Who?"), message("gpt", "Me.")]
    assert trained([{"messages": human}], system_prompt="Be brief.") == want
    assert trained([{"messages": [{**m, "name": None, "tool_calls": None} for m in plain["messages"]],
                     "tools": "[]"}]) == want
    assert trained([{"messages": plain["messages"], "tools": []}]) == want


@pytest.mark.parametrize("messages, part", [
    ([message("developer", "x"), *TALK], "message 1 has the role 'developer'"),
    ([ASK, message("tool", "4"), ANSWER], "message 2 has the role 'tool'"),
    ([{"from": "bing", "value": "x"}, *TALK],
     "has the role 'bing'; it must be system, user or assistant, or human or gpt"),
    ([message("user", [{"type": "image"}, {"type": "text", "text": "?"}]), ANSWER],
     "has a part of the type 'image'"),
    ([ASK, message("assistant", None)], "message 2 has a content that must be a string, found null"),
    (json.dumps(TALK), "found a string; give each a role and a content, which `json.loads`"),
    ({"role": "user"}, "found an object"),
])
def test_errors_in_messages(messages, part):
    with pytest.raises(DataError, match=re.escape(part)): trained([{"messages": messages}])


# Remedies in error messages


REMEDIES = [  # rows, keys, a part of the message, keys as it proposes
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
        "remove it",
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


@pytest.mark.parametrize("rows, keys, part, remedy", REMEDIES, ids=[part[:40] for _, _, part, _ in REMEDIES])
def test_a_proposed_remedy_works(rows, keys, part, remedy):
    Path("mine.py").write_text(MINE)
    with pytest.raises(UserError) as error: trained(rows, **keys)
    assert part in str(error.value), error.value
    assert trained(rows, **remedy)


# Files of another format


TWO = [{"instruction": "Name a bird, please.", "response": 'A "gull"\nor two.'},
       {"instruction": "Ünd?", "response": "No."}]
FORMS = {  # name: (content, name of the format in the message, rows after the proposed command)
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
def test_a_file_of_another_format_is_named_and_the_proposed_command_converts_it(name):
    content, format_name, rows = FORMS[name]
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as error: list(read_jsonl(name))
    message = str(error.value)
    check_sentence(message, name, format_name)
    assert "not valid JSON" not in message
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(re.search("`(.*)`", message)[1], shell=True, check=True, env={**os.environ, "PATH": path},
                   executable="/bin/bash")
    new = re.search(r"and give (.*)$", message)[1]
    assert [row.value for row in read_jsonl(new)] == rows and Path(name).exists()


def test_binary_files_are_recognized_by_their_first_bytes():
    for name, content, part in (
        ("a.gz", b"\x1f\x8b\x08", "`gunzip < a.gz > a`"), ("a.parquet", b"PAR1\x15", "pandas.read_parquet"),
        ("a.zip", b"PK\x03\x04 x", "`unzip a.zip`"),
        ("a.xlsx", b"PK\x03\x04 xl/workbook.xml", "pandas.read_excel"),
        ("a.jsonl", b"<!DOCTYPE html><html>", "is a web page"),
        ("b.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "`git lfs pull`"),
        ("c.csv", b"a,b\ncaf\xe9,x\n", "is not UTF-8 (byte 0xe9)")):
        Path(name).write_bytes(content)
        with pytest.raises(DataError) as error: list(read_jsonl(name))
        check_sentence(str(error.value), part)


@pytest.mark.parametrize("first", ['{"instruction": "cut', "{'instruction': 'x'}", "7", '"text"', "garbage",
                                   "[1"])
def test_a_bad_first_row_is_a_bad_row(first):
    Path("rows.jsonl").write_text(first + "\n" + json.dumps(PAIR) + "\n")
    with pytest.raises(DataError, match="^rows.jsonl, line 1: "): list(read_jsonl("rows.jsonl"))
    assert read_examples("rows.jsonl", ByteTokenizer(), PromptFormat(), 100,
                         on_bad_row="skip").source["skipped"] == 1


# Adapters and paths


def test_foreign_adapters_are_refused_with_the_command_that_merges_them():
    mlx = {"model": "base", "fine_tune_type": "lora"}
    peft = {"peft_type": "LORA", "base_model_name_or_path": "org/base"}
    fuse = "`mlx_lm.fuse --model base --adapter-path mlx --save-path mlx-merged`"
    for name, about, part in (("mlx", mlx, fuse), ("peft", peft, "merge_and_unload")):
        Path(name).mkdir()
        Path(name, "adapter_config.json").write_text(json.dumps(about))
        with pytest.raises(PretrainedError) as error: load(name)
        check_sentence(str(error.value), part, f"and give {name}-merged")
        assert about.get("base_model_name_or_path", "base") in str(error.value)


def test_a_file_next_to_the_configuration_is_proposed(monkeypatch):
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


def test_the_home_directory_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("mine.py").write_text("def f(row): return {'instruction': 'home', 'response': 'x'}\n")
    assert "home" in trained([PAIR], preprocess="~/mine.py:f")
    assert load_object("~/mine.py:f", "reward_model")({})["instruction"] == "home"
