"Conversations: the tokens and the loss mask of messages, and that no text becomes a special token."
import json
from pathlib import Path

import pytest
from common import forall
from hypothesis import strategies as st

import mlx_pretrain  # noqa: F401, I001 (before MLX)

from mlx_pretrain import chat
from mlx_pretrain.chat import read_messages, render, render_chat, row_pieces, template_pieces
from mlx_pretrain.cli import main
from mlx_pretrain.config import ConfigError, DataError, load_config
from mlx_pretrain.model import Llama, LlamaArgs
from mlx_pretrain.ppo import PPOConfig, PPOTrainer
from mlx_pretrain.pretrained import export, load
from mlx_pretrain.prompt import Piece, PromptFormat, encode_pieces
from mlx_pretrain.reward import RewardConfig, RewardTrainer
from mlx_pretrain.run import checkpoints, read_metadata
from mlx_pretrain.sft import SFTConfig, SFTTrainer, sft
from mlx_pretrain.tokenizer import ByteTokenizer, SpecialTokens, load_tokenizer

CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
TRIMMED = CHATML.replace("message['content']", "message['content'] | trim")
ASK = "### Instruction:\n{}\n\n### Response:"
START, END = 257, 258
BY_TEMPLATE = PromptFormat(prompt_format=None)
FORM = pytest.mark.parametrize("form", ["chat_template.jinja", "string", "list"])


def message(role, content, **more): return {"role": role, "content": content, **more}


TALK = [message("system", "Be brief."), message("user", "Who is there?"), message("assistant", "The gulls."),
        message("user", "And?"), message("assistant", "Boats & <|im_end|>"), message("user", "Thanks!")]
TALKS = [TALK, TALK[1:3], [*TALK[:2], {**TALK[2], "weight": 0}, *TALK[3:]],
         [*TALK[:3], message("assistant", "Many."), TALK[1]]]


def make_tokenizer(folder, template=CHATML, form="chat_template.jinja", more=(), **names):
    "A byte tokenizer in Hugging Face's format, with a chat template in one of its three places."
    special = SpecialTokens(**{"pad": "<pad>", "bos": "<|im_start|>", "eos": "<|im_end|>", **names})
    ByteTokenizer(special_tokens=special).save(folder)
    about = {"tokenizer_class": "PreTrainedTokenizerFast",
             **{f"{key}_token": name for key, name in special.model_dump().items()}}
    if more: about["extra_special_tokens"] = list(more)
    if form == "string": about["chat_template"] = template
    if form == "list":
        about["chat_template"] = [{"name": "tool_use", "template": "no"},
                                  {"name": "default", "template": template}]
    Path(folder, "tokenizer_config.json").write_text(json.dumps(about))
    if form == "chat_template.jinja": Path(folder, form).write_text(template)
    return load_tokenizer(folder)


@pytest.fixture
def tok(tmp_path): return make_tokenizer(tmp_path / "tokenizer")


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_base(template=CHATML, form="chat_template.jinja"):
    "A randomly initialized chat model in Hugging Face's format: hf/."
    tokenizer = make_tokenizer("tokens", template, form)
    args = LlamaArgs(vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                     num_attention_heads=2, num_key_value_heads=2, head_dim=16, max_position_embeddings=256)
    export(Llama(args), tokenizer, "hf")


def write(rows):
    Path("rows.jsonl").write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n"
                                          for row in rows))


def config(data={}, training={}, **sections):  # noqa: B006 (read only)
    hyper = {"batch_size": 4, "learning_rate": 1e-2}
    return SFTConfig.model_validate_json(
        json.dumps(
            {
                "name": "run",
                "data": {"input_file": "rows.jsonl", "preprocessing": {"max_context_size": 200}, **data},
                "training": {"hyperparameters": hyper, **training},
                **sections,
            }
        )
    )


def with_mask(messages):
    "The messages up to the last trained answer, and for each whether it is trained."
    trained = [m["role"] == "assistant" and m.get("weight", 1) == 1 for m in messages]
    return [*zip(messages, trained)][:len(messages) - trained[::-1].index(True)]


def in_chatml(messages):
    "Each token of a conversation, and whether it is trained, by hand."
    for m, trained in with_mask(messages):
        yield from [(START, False), *((byte, False) for byte in f"{m['role']}\n".encode())]
        yield from [*((byte, trained) for byte in m["content"].encode()), (END, trained), (10, False)]


def prompt_in_chatml(messages):
    "The tokens of a prompt, by hand."
    answer = list(in_chatml([*messages, message("assistant", "")]))
    return [i for i, _ in answer[:-2]]


def in_format(messages):
    "The same in the default prompt format."
    yield START, False
    for m, trained in with_mask(messages):
        if m["role"] == "assistant":
            yield from [*((byte, trained) for byte in m["content"].encode()), (END, trained)]
        else:
            yield from ((byte, False)
                        for byte in (f"{m['content']}\n\n" if m["role"] == "system"
                                     else ASK.format(m["content"])).encode())


def rows_of(trainer): return [[*zip(*trainer.data[i])] for i in range(len(trainer.data))]


# What is trained


@FORM
@pytest.mark.parametrize("lora", [0, 2])
def test_exactly_the_answers_and_their_eos_are_trained(place, form, lora):
    make_base(form=form)
    write([{"messages": talk} for talk in TALKS])
    trainer = SFTTrainer(config(pretrained_model="hf", training={"lora": {"rank": lora}}))
    assert rows_of(trainer) == [[*in_chatml(talk)] for talk in TALKS] and trainer.format.prompt_format is None
    assert trainer.step()["tokens"] == sum(trained for talk in TALKS for _, trained in in_chatml(talk))


def test_without_chat_template_the_prompt_format_is_used(place):
    make_base(form="none")
    write([{"messages": talk} for talk in TALKS[:3]])
    for name in ("hf", None):
        data = {} if name else {"tokenizer_path": "tokens"}
        trainer = SFTTrainer(config(pretrained_model=name, data=data))
        assert rows_of(trainer) == [[*in_format(talk)] for talk in TALKS[:3]]


def header_trained(monkeypatch):
    def without_header(tokenizer, messages, add_generation_prompt=False, date=None):
        return render(tokenizer, messages)
    monkeypatch.setattr(chat, "render", without_header)


def answers(monkeypatch, trained):
    "Choose what of an answer is trained, by the positions of a part and of EOS."
    def answer(tokenizer, parts):
        return [Piece(part, trained(n, parts.index(tokenizer.eos_id))) for n, part in enumerate(parts)]
    monkeypatch.setattr(chat, "_answer_pieces", answer)


def end_only_read(monkeypatch): answers(monkeypatch, lambda n, end: n < end)
def end_alone(monkeypatch): answers(monkeypatch, lambda n, end: n == end)
def line_break_trained(monkeypatch): answers(monkeypatch, lambda n, end: True)


def messages_with(monkeypatch, trained):
    def read(value):
        return [{**m, "trained": trained(m, m is messages[-1])} for messages in [read_messages(value)]
                for m in messages]
    monkeypatch.setattr(chat, "read_messages", read)


def only_the_last(monkeypatch): messages_with(monkeypatch, lambda m, last: last)
def weight_ignored(monkeypatch): messages_with(monkeypatch, lambda m, last: m["role"] == "assistant")


def text_becomes_control(monkeypatch):
    monkeypatch.setattr(chat, "_escape_special_tokens", lambda tokenizer, messages: (messages, "\ue000"))


BUGS = [header_trained, end_only_read, end_alone, line_break_trained, only_the_last, weight_ignored,
        text_becomes_control]


def encoded(tok, messages):
    return [*zip(*encode_pieces(tok, [row_pieces(BY_TEMPLATE, tok, {"instruction": messages})])[0])]


@pytest.mark.parametrize("bug", BUGS)
def test_planted_mask_bugs_are_detected(tok, monkeypatch, bug):
    right = [[*in_chatml(talk)] for talk in TALKS]
    assert [encoded(tok, talk) for talk in TALKS] == right
    bug(monkeypatch)
    assert [encoded(tok, talk) for talk in TALKS] != right


def test_pair_equals_conversation_of_two_messages(place):
    make_base()
    write([{"instruction": "Who?", "response": "Gulls."}, {"instruction": "And?", "response": "Boats."}])
    talks = [[message("user", "Who?"), message("assistant", "Gulls.")],
             [message("user", "And?"), message("assistant", "Boats.")]]
    assert rows_of(SFTTrainer(config(pretrained_model="hf"))) == [[*in_chatml(talk)] for talk in talks]


@pytest.mark.parametrize("how", ["keep_start", "keep_end"])
def test_truncated_conversation(place, how):
    make_base()
    talk = [message("user", "Who?"), message("assistant", "The old gulls."), message("user", "And?"),
            message("assistant", "Boats.")]
    write([{"messages": talk}])
    whole = [*in_chatml(talk)]
    answers = [n for n, (_, trained) in enumerate(whole) if trained]
    last = answers[-len("Boats.") - 1]
    # the last loses its end, or the first its start
    context = len(whole) - 4 if how == "keep_start" else len(whole) - answers[0] - 3
    [row] = rows_of(SFTTrainer(config(pretrained_model="hf",
                                      data={"truncation": how,
                                            "preprocessing": {"max_context_size": context}})))
    if how == "keep_start": assert row == whole[:context]
    else:
        assert row == [whole[0],
                       *((i, trained and n >= last)
                         for n, (i, trained) in enumerate(whole) if n > len(whole) - context)]


# Text stays text


NASTY = ["<|im_end|>", "<|im_start|>", "<|im_start|>assistant\n", "<|im_<|im_end|>end|>", "<|im_", "end|>",
         "<pad>", "<", "|>", " ", "\n", "\t", "\ue000", "\ue001", "<\ue000|im_end|>", "{{ bos_token }}", "é",
         "\u2028"]
CONTENT = st.lists(st.sampled_from(NASTY), min_size=1, max_size=8).map("".join)


@pytest.mark.parametrize("template, left", [(CHATML, str), (TRIMMED, str.strip)], ids=["as it is", "trimmed"])
def test_no_text_becomes_a_special_token(tmp_path, template, left):
    tok = make_tokenizer(tmp_path, template)

    @forall(contents=st.tuples(CONTENT, CONTENT, CONTENT, CONTENT.filter(str.strip)))
    def check(contents):
        talk = [message(role, content)
                for role, content in zip(["system", "user", "user", "assistant"], contents)]
        first, second, third, last = clean = [{**m, "content": left(m["content"])} for m in talk]
        assert encoded(tok, talk) == [*in_chatml(clean)]
        fmt = PromptFormat(prompt_format=None, system_prompt=contents[0])
        assert render_chat(fmt, tok, [(contents[1], contents[3])],
                           contents[2]) == prompt_in_chatml([first, second, last, third])
    check()


SHORT = ("{% for m in messages %}{{ m.role[0] + m.content }}##{% endfor %}"
         "{% if add_generation_prompt %}a{% endif %}")
PRIVATE = "".join(map(chr, range(0xE000, 0xF900)))


@pytest.mark.parametrize("before, text", [
    pytest.param("", "### x", id="names that overlap"),
    pytest.param("", "#", id="a name that the template would complete"),
    pytest.param("", PRIVATE + "##", id="many private characters in the text"),
    pytest.param("\ue000", "##", id="one in the template"),
    pytest.param("", "\ue000##", id="one in the text")])
def test_escaping_of_unusual_characters(tmp_path, before, text):
    tok = make_tokenizer(tmp_path, before + SHORT, eos="##")
    assert [i for i, _ in encoded(tok, [message("user", text), message("assistant", "x")])] == [
        *f"{before}u{text}".encode(),
        END,
        *b"ax",
        END,
    ]


# Other forms of the same


def test_content_parts_and_trl_prompt_completion(tok):
    "Content in parts; and TRL's format, in which prompt and completion are parts of a conversation."
    parts = [{**m, "content": [{"type": "text", "text": m["content"][:3]},
                               {"type": "text", "text": m["content"][3:]}]} for m in TALK[1:3]]
    assert encoded(tok, parts) == encoded(tok, TALK[1:3])
    trl = PromptFormat(prompt_format=None, input_field="prompt", output_field="completion")
    assert row_pieces(trl, tok,
                      {"prompt": TALK[1:2],
                       "completion": TALK[2:3]}) == row_pieces(BY_TEMPLATE, tok, {"instruction": TALK[1:3]})
    with pytest.raises(DataError, match="tools"):
        row_pieces(BY_TEMPLATE, tok, {"instruction": TALK[1:3], "tools": [{}]})


def test_unread_columns_and_settings_are_reported(place, caplog):
    make_base()
    write([{"instruction": "Add.", "input": "1, 2", "output": "3"}])
    trainer = SFTTrainer(config(pretrained_model="hf"))
    assert 'not read: "input" (1 row); set "data.input_field_optional: input"' in caplog.text
    assert b"1, 2" not in bytes(i for i in trainer.data[0].ids if i < 256)
    write([{"text": "<|im_start|>user"}, {"text": "<|im_end|>"}])
    SFTTrainer(config(pretrained_model="hf"))
    assert caplog.text.count("which is not the special token") == 1
    write([{"messages": TALK}])
    formatted = config(pretrained_model="hf", data={"response_format": "{response}!"})
    with pytest.raises(ConfigError, match="has no effect on messages"): SFTTrainer(formatted)


# Other people's chat templates


HOSTILE = {
    "{{ ''.__class__.__mro__ }}": "is unsafe",
    "{{ messages.append(1) }}": "is unsafe",
    "{{ messages[0].update(role='x') }}": "is unsafe",
    "{{ cycler.__init__.__globals__.os.system('x') }}": "is unsafe",
    "{{ (messages | attr('append'))(1) }}": "is unsafe",
    "{% for i in range(10**9) %}x{% endfor %}": "Range too big",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "recursion",
    "{{ 'x' * 10**18 }}": "refuses these messages",
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}": "recursion",
    "{{ messages[9].content }}": "refuses these messages",
    "{{ messages[0].content.no.such }}": "refuses these messages",
    "{% include '/etc/passwd' %}": "refuses these messages",
    "{% import 'os' as os %}": "refuses these messages",
    "{{ raise_exception('roles\nmust\nalternate') }}": "(roles must alternate)",
    "{% for %}": "is not a Jinja program", "{% nonsense %}": "is not a Jinja program",
    "{{ 1 / 0 }}": "division",
    "{{ '%d' % 'x' }}": "refuses these messages",
    "": "does not end answers with <|im_end|>",
    CHATML.replace("+ '<|im_end|>' +", "+"): "does not end answers with <|im_end|>",
    CHATML.replace("assistant\n'", "assistant (thinks)\n'"): "do not continue its generation prompt",
}


@pytest.mark.parametrize("template", HOSTILE)
def test_hostile_template_gives_one_sentence(tmp_path, template):
    tok = make_tokenizer(tmp_path, template)
    with pytest.raises(DataError) as error: template_pieces(tok, read_messages(TALK))
    sentence = str(error.value)
    assert HOSTILE[template] in sentence and "\n" not in sentence and len(sentence) < 500
    assert sentence.endswith('set "data.prompt_format" instead')


REASONED = [message("user", "Who?"), message("assistant", "<think>Hm.</think>Gulls."),
            message("user", "And?"), message("assistant", "<think>Ah.</think>Boats.")]
DROPPED = [REASONED[0], message("assistant", "Gulls."), *REASONED[2:]]


@pytest.fixture
def thinker(tmp_path):
    "A tokenizer whose template drops earlier reasoning."
    content = "(message.content if loop.last else message.content.split('</think>')[-1])"
    return make_tokenizer(tmp_path, CHATML.replace("message['content']", content))


def test_template_that_drops_reasoning_trains_the_last_answer(thinker, caplog):
    chat._warn_untrained.cache_clear()
    last_only = [DROPPED[0], {**DROPPED[1], "weight": 0}, *DROPPED[2:]]
    assert encoded(thinker, REASONED) == encoded(thinker, REASONED) == [*in_chatml(last_only)]
    assert caplog.text.count("only the last assistant message is trained on") == 1      # logged once
    # an earlier answer without reasoning continues its generation prompt
    assert encoded(thinker, DROPPED) == [*in_chatml(DROPPED)]


R1 = ("{{ bos_token }}{% for m in messages %}"
      "{% if m['role'] == 'user' %}{{ '<|user|>' + m['content'] }}{% else %}"
      "{% set c = m['content'] %}{% if '</think>' in c %}{% set c = c.split('</think>')[-1] %}{% endif %}"
      "{{ '<|assistant|>' + c + '<|im_end|>' }}{% endif %}{% endfor %}"
      "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}")


@pytest.mark.parametrize("answer", [
    message("assistant", "<think>\nHm.\n</think>\n\nGulls."),
    message("assistant", "Hm.\n</think>\n\nGulls."),
    message("assistant", "Gulls.", reasoning_content="Hm."),
    message("assistant", " <think>\nHm.\n</think>\n\nGulls.")])
def test_template_that_opens_reasoning_trains_it(tmp_path, answer):
    tok = make_tokenizer(tmp_path, R1)
    messages = [message("user", "Who?", trained=False), {**answer, "trained": True}]
    [example] = encode_pieces(tok, [template_pieces(tok, messages)])
    prompt = render_chat(BY_TEMPLATE, tok, [], "Who?")
    # trained after the generation prompt
    assert example.ids[:example.start] == prompt and bytes(prompt[-8:]) == b"<think>\n"
    assert example.ids[example.start:] == [*b"Hm.\n</think>\n\nGulls.", END]


def test_template_that_opens_reasoning_refuses_answers_without(tmp_path):
    tok = make_tokenizer(tmp_path, R1)
    talk = [message("user", "Who?", trained=False), message("assistant", "Gulls.", trained=True)]
    for content in ("Gulls.", "<think>Hm.</think>"):
        with pytest.raises(DataError, match="not reasoning followed by an answer; write <think>…</"):
            template_pieces(tok, [talk[0], {**talk[1], "content": content}])
    followed = [talk[0], {**talk[1], "content": "<think>…</think>Gulls."}]               # the remedy works
    assert template_pieces(tok, followed)[-1] == (tok.eos_id, True, False)


def test_template_uses_the_date_of_the_run(tmp_path):
    tok = make_tokenizer(tmp_path, "{{ strftime_now('%d %b %Y') }}" + CHATML)
    assert chat.render(tok, TALK[:2], date="2024-07-26").startswith("26 Jul 2024")
    assert render_chat(BY_TEMPLATE.model_copy(update={"date": "2024-07-26"}), tok, [],
                       "?")[:11] == [*b"26 Jul 2024"]
    assert chat.render(tok, TALK[:2])[7:11].isdigit()                     # without a date: today's


@pytest.mark.parametrize("lora", [0, 2])
def test_a_resumed_run_keeps_its_date(place, monkeypatch, caplog, lora):
    class Clock(chat.datetime):
        day = 1
        @classmethod
        def now(cls, tz=None): return cls(2026, 1, cls.day)
    monkeypatch.setattr(chat, "datetime", Clock)
    make_base("{{ strftime_now('%Y-%m-%d') }}" + CHATML)
    write([{"messages": TALKS[0]}])
    def cfg(iters, **more):
        hyper = {"batch_size": 4, "learning_rate": 1e-2, "iters": iters}
        return config(pretrained_model="hf", training={"hyperparameters": hyper, "lora": {"rank": lora}},
                      **more)
    assert load_config(SFTConfig, sft(cfg(1)) / "config.yaml").data.date == "2026-01-01"
    Clock.day = 2
    assert load_config(SFTConfig,
                       sft(cfg(2, resume={"checkpoint": "latest"})) / "config.yaml").data.date == "2026-01-01"
    assert "data.date" not in caplog.text and "training data" not in caplog.text
    assert load("runs/run").format.date == "2026-01-01" and SFTTrainer(cfg(1)).format.date == "2026-01-02"
    with pytest.raises(ValueError, match="is not a date; write it like 2026-11-30"):
        config(data={"date": "tomorrow"})


def test_reward_and_ppo_trainers_fix_the_date(place):
    make_base("{{ strftime_now('%Y-%m-%d') }}" + CHATML)
    write([{"prompt": "Who?", "chosen": "Gulls.", "rejected": "Boats."}])
    data, today = {"input_file": "rows.jsonl", "response_length": 8}, chat.datetime.now().date().isoformat()
    cfg = json.dumps({"pretrained_model": "hf", "data": data})
    for trainer in (PPOTrainer(PPOConfig.model_validate_json(cfg), reward=lambda prompt, response: 0.0),
                    RewardTrainer(RewardConfig.model_validate_json(cfg))):
        assert trainer.format.date == trainer.cfg.data.date == today
        assert bytes(i for i in trainer.data.prompts[0] if i < 256).startswith(today.encode())


def test_several_stop_tokens_end_answers(tmp_path):
    tok = make_tokenizer(tmp_path, CHATML.replace("<|im_end|>", "<|eot|>"), more=["<|eot|>"])
    with pytest.raises(
        DataError, match='add the token that it writes to "eos_token_id" in generation_config.json'
    ):
        template_pieces(tok, read_messages(TALK))
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [END, tok.control["<|eot|>"]]})
    )
    again = type(tok)(tmp_path)                                           # the remedy works
    ends = [piece.content for piece in template_pieces(again, read_messages(TALK)) if piece.trained
            and isinstance(piece.content, int)]
    assert set(ends) == {tok.control["<|eot|>"]} and again.eos_ids == (END, tok.control["<|eot|>"])


def test_reasoning_of_an_untrained_answer_is_dropped(thinker):
    untrained, expected = ([talk[0], {**talk[1], "weight": 0}, *talk[2:]] for talk in (REASONED, DROPPED))
    assert encoded(thinker, untrained) == [*in_chatml(expected)]


def test_generation_prompt_drops_earlier_reasoning(thinker):
    assert render_chat(BY_TEMPLATE, thinker, [("Who?", REASONED[1]["content"])],
                       "And?") == prompt_in_chatml(DROPPED[:3])


# Rows that cannot be used


FIRST = [("hi", "message 1 is not an object with a role and a content"),
         ({"from": "bird", "value": "x"}, "message 1 has the role 'bird'"),
         (message("tool", "4"), "message 1 has the role 'tool'; it must be system, user or assistant"),
         (message(["user"], "x"), "message 1 has the role ['user']"),
         (message("user", None), "message 1 has a content that must be a string"),
         (message("user", [{"type": "image_url", "image_url": "x"}]),
          "message 1 has a part of the type 'image_url', and"),
         (message("assistant", " \n"), "message 1 is an empty assistant message"),
         (message("assistant", "x", weight=0.5), "message 1 has the weight 0.5; it must be 0 or 1"),
         (message("assistant", "", tool_calls=[1]), "message 1 calls a tool"),
         (message("user", "half \ud83d"), "half a character"), ]
WHOLE = [([], "there is no assistant message to train on"), (TALK[:2], "there is no assistant message"),
         ([TALK[1], message("assistant", "x", weight=0)], "there is no assistant message"),
         (TALK[2:3], "the conversation starts with an assistant message"), (None, "messages"),
         ({"role": "user"}, "messages"),
         ([TALK[1], TALK[0], TALK[2]], "message 2 is a system message, which is only allowed first"),
         ([message("user", "long " * 60), TALK[2]], "the prompt has 3"), ]
FORMATTED = [([TALK[1], TALK[1], TALK[2]], "user and assistant must take turns")]
ALL = [([first, *TALK[1:3]], sentence) for first, sentence in FIRST] + WHOLE


@pytest.mark.parametrize("form", ["chat_template.jinja", "none"])
def test_invalid_row_is_reported_with_its_line(place, form):
    make_base(form=form)
    for messages, sentence in ALL + (FORMATTED if form == "none" else []):
        write([{"messages": TALK}, {"messages": messages}])
        with pytest.raises(DataError) as error: SFTTrainer(config(pretrained_model="hf"))
        assert (
            str(error.value).startswith("rows.jsonl, line 2: ")
            and sentence in str(error.value)
            and "\n" not in str(error.value)
        )
        source = SFTTrainer(config(pretrained_model="hf", data={"on_bad_row": "skip"})).data.source
        assert (source["rows"], source["kept"], source["skipped"]) == (2, 1, 1), messages


@pytest.mark.parametrize("form", ["chat_template.jinja", "none"])
def test_messages_that_are_a_text_are_refused(place, form):
    "Otherwise the model would be trained to repeat its prompt."
    make_base(form=form)
    write([{"messages": TALK}, {"messages": "hello"}])
    with pytest.raises(DataError, match="rows.jsonl, line 2: .*messages"):
        SFTTrainer(config(pretrained_model="hf"))


def test_message_of_a_refusing_template_is_shown(place, capsys):
    make_base(
        "{% if messages[0].role != 'user' %}{{ raise_exception('Only users begin') }}{% endif %}" + CHATML
    )
    write([{"messages": TALK[1:]}, {"messages": TALK}])
    Path("run.yaml").write_text(json.dumps({"pretrained_model": "hf", "data": {"input_file": "rows.jsonl"}}))
    assert main(["sft", "--config", "run.yaml"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "mlx-pretrain: rows.jsonl, line 2: the chat template refuses these messages (Only users begin); "
        'change them, or set "data.prompt_format" instead')


# From rows to a chat model


@pytest.fixture
def tuned(place):
    "A chat model fine-tuned on two short conversations, with LoRA."
    make_base(form="string")
    talks = [[message("user", "Who?"), message("assistant", "Gulls."),
              message("user", "And?"), message("assistant", "Boats & <|im_end|>")],
             [message("user", "And?"), message("assistant", "Sand.")]]
    write([{"messages": talk} for talk in talks])
    return sft(config(pretrained_model="hf", data={"system_prompt": "Be brief."},
                      training={"epochs": 150, "lora": {"rank": 16, "alpha": 64}}))


def test_generate_and_chat_use_the_chat_template(tuned, capsys, monkeypatch):
    prompts, original = [], chat.render_chat
    monkeypatch.setattr(chat, "render_chat", lambda *args: prompts.append(original(*args)) or prompts[-1])
    system, greedy = message("system", "Be brief."), ["--temperature", "0", "--max_new_tokens", "40"]
    for run in (tuned, checkpoints(tuned)[-1], tuned / "model"):
        assert main(["generate", "--run", str(run), "--instruction", "And?", *greedy]) == 0
        assert capsys.readouterr().out == "Sand.\n" and prompts[-1] == prompt_in_chatml(
            [system, message("user", "And?")]
        )
    typed = iter(["Who?", "And?", "/new", "And?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    assert main(["chat", "--run", str(tuned), "--turns", "2", *greedy]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["Gulls.", "Boats & <|im_end|>", "Sand."]
    assert prompt_in_chatml([system, message("user", "Who?"), message("assistant", "Gulls."),
                            message("user", "And?")]) in prompts
    assert main(["generate", "--run", "hf", "--instruction", "And?", *greedy]) == 0      # not trained here
    assert prompts[-1] == prompt_in_chatml([message("user", "And?")])


def test_exported_template_adds_the_trained_system_prompt(tuned):
    "The system prompt of the training is the default of the template, for messages without one."
    tok, question = load(tuned).tokenizer, [message("user", "Who?")]
    assert (
        tok.chat_template.endswith(CHATML)
        and "chat_template" not in (tuned / "model" / "tokenizer_config.json").read_text()
    )
    own = load_tokenizer("hf")
    with_system = render(own, [message("system", "Be brief."), *question], True)
    assert render(tok, question, True) == with_system != render(own, question, True)
    assert render(tok, TALK) == render(own, TALK)
    for place in (tuned, checkpoints(tuned)[-1], tuned / "model"):
        assert load(place).format.prompt_format is None
    assert (
        "prompt_format" in read_metadata(tuned)["format"] and load(tuned).format.system_prompt == "Be brief."
    )


@FORM
@pytest.mark.parametrize("prompt_format, ours", [
    (None, True), ("Q: {instruction}\nA:", True), ("{topic}: {instruction}", False)])
def test_exported_chat_template(place, form, prompt_format, ours):
    make_base(form=form)
    write([{"instruction": "Who?", "response": "Gulls.", "topic": "x"}])
    path = sft(config(pretrained_model="hf", data={"prompt_format": prompt_format},
                      training={"hyperparameters": {"iters": 1}})) / "model"
    texts = [file.read_text() for file in (path / "tokenizer_config.json",
                                           path / "chat_template.jinja") if file.exists()]
    assert any("message['role']" in text and "im_end" in text for text in texts) == (prompt_format is None)
    assert (load(path).tokenizer.chat_template is not None) == ours
    if prompt_format is None: assert load(path).tokenizer.chat_template == CHATML
    assert (
        load(path).format.prompt_format == prompt_format
        and load(path).tokenizer.fingerprint == load("hf").tokenizer.fingerprint
    )
    if prompt_format and ours:
        messages = [message("user", "Who?"), message("assistant", "Gulls."), message("user", "And?")]
        assert render(load(path).tokenizer, messages,
                      add_generation_prompt=True) == "<|im_start|>Q: Who?\nA:Gulls.<|im_end|>Q: And?\nA:"


def test_the_system_prompt_is_a_system_turn(place):
    make_base()
    write([{"messages": TALK[1:3]}, {"messages": TALK[:3]}])
    trainer = SFTTrainer(config(pretrained_model="hf", data={"system_prompt": "Be kind <|im_end|>."}))
    assert rows_of(trainer) == [[*in_chatml([message("system", "Be kind <|im_end|>."), *TALK[1:3]])],
                                [*in_chatml(TALK[:3])]]
