"Rewards that read dataset columns: which ones they get, row by row, and the message if one is missing."
import functools
import json

import numpy as np
import pytest

from mlx_pretrain import rl_trainer
from mlx_pretrain.config import DataError
from mlx_pretrain.core import RewardModel, as_reward_model, reward_columns
from mlx_pretrain.prompts import read_prompts
from mlx_pretrain.model import ScalarLlama
from mlx_pretrain.pretrained import PretrainedError
from mlx_pretrain.prompt import PromptFormat
from mlx_pretrain.reward_model import TrainedReward, load_reward
from mlx_pretrain.rules import Length, WeightedSum
from mlx_pretrain.score import RewardError, check_row, find_reward, reward_name, score
from mlx_pretrain.tokenizer import ByteTokenizer, HFTokenizer
from common import check_sentence
from toys import task, tiny

ROWS = [{"prompt": letter, "answer": letter.upper(), "meta": {"seen": [letter]}} for letter in "abcdefgh"]


class KeywordOnly(RewardModel):
    def compute_reward(self, prompts, responses, *, answer):
        return [float(a == p.upper()) for p, a in zip(prompts, answer, strict=True)]


class Static:
    @staticmethod
    def compute_reward(prompts, responses, answer="none"):
        return [float(a == p.upper()) for p, a in zip(prompts, answer, strict=True)]


class Callable:
    def __call__(self, prompt, response, answer): return float(answer == prompt.upper())


def exact(prompt, response, answer): return float(answer == prompt.upper())
def other_names(p, r, prompt, answer): return float(answer == prompt.upper() == p.upper())
def everything(prompt, response, **columns):
    return float(columns["answer"] == prompt.upper() and "prompt" not in columns)
def with_messages(prompt, response, prompt_messages):
    return float(prompt_messages == [{"role": "user", "content": prompt}])
def nested(prompt, response, meta): return float(meta["seen"].pop() == prompt)
def bound(prompt, response, answer, points): return points if answer == prompt.upper() else 0.0
def of_two(prompt, response): return 1.0


FORMS = [exact, other_names, everything, with_messages, nested, of_two,
         lambda prompt, response, answer: exact(prompt, response, answer),
         functools.partial(bound, points=1.0), Callable(), KeywordOnly(), Static(),
         WeightedSum((0.5, exact), (0.5, KeywordOnly()))]


@pytest.mark.parametrize("reward", FORMS, ids=lambda reward: reward_name(find_reward(reward)))
def test_each_response_is_scored_with_the_columns_of_its_row(reward):
    "In any order, and twice: rewards get copies of nested columns. Red if it gets another row's value."
    trainer = task(reward, prompts=ROWS, batch=8, response_length=2)
    for indices in (np.arange(8), np.array([5, 1, 1, 7]), np.array([5, 1, 1, 7])):
        sampled = trainer.sample(trainer.data, indices, {"temperature": 1.0}, 0)
        assert sampled.scores.tolist() == [1.0] * len(indices)
        assert sampled.prompt_texts == [ROWS[i]["prompt"] for i in indices]


def test_columns_go_with_the_rows_through_training_and_validation(tmp_path, monkeypatch):
    "Batches, held-out prompts of which some are chosen, and samples."
    monkeypatch.setattr(rl_trainer, "MAX_HELD_OUT", 5)
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[::-1]))
    seen = []
    def noted(prompt, response, answer):
        seen.append((prompt, answer))
        return 0.0
    trainer = task(noted, prompts=ROWS, batch=4, steps=3, response_length=2,
                   validation_file=str(tmp_path / "held.jsonl"))
    for _ in range(2): trainer.step()
    assert len(seen) == len(set(seen)) == 8                               # an epoch
    trainer.evaluate()
    assert len(seen) == 8 + 5 and len(trainer.samples(2)) == 2
    assert all(answer == prompt.upper() for prompt, answer in seen)


@pytest.mark.parametrize("reward, available, given, missing", [
    (exact, ["prompt", "answer", "more"], ["answer"], []), (exact, ["prompt"], [], ["answer"]),
    (lambda p, r, answer="": 0.0, ["prompt"], [], []),
    (lambda p, r, answer="": 0.0, ["answer"], ["answer"], []),
    (lambda p, r, **more: 0.0, ["p", "prompt", "answer"], ["prompt", "answer"], []),
    (lambda *texts, answer: 0.0, ["answer", "texts"], ["answer"], []),
    (of_two, ["prompt", "response", "answer"], [], []),
    (functools.partial(bound, points=2.0), ["answer", "points"], ["answer"], []), (max, ["answer"], [], []),
    (KeywordOnly(), ["prompts", "answer"], ["answer"], []), (Static(), [], [], []),
    (WeightedSum((1, exact)), ["prompt", "answer"], ["prompt", "answer"], [])])
def test_signature_decides_the_columns(reward, available, given, missing):
    assert reward_columns(as_reward_model(reward), available) == (given, missing)


@pytest.mark.parametrize("reward, name", [
    (exact, "exact"), (functools.partial(bound, points=1), "bound"), (Callable(), "Callable"),
    (KeywordOnly(), "KeywordOnly"), (Length(2), "Length(words=2)")])
def test_a_reward_has_the_same_name_in_every_process(reward, name):
    "A resumed run compares it. Red if an address in memory is a part of it."
    assert reward_name(find_reward(reward)) == name


def test_attribute_f_of_a_reward_is_not_its_function():
    class Mine(RewardModel):
        f = [1, 2]
        def compute_reward(self, prompts, responses): return 1 / 0
    with pytest.raises(RewardError, match="Mine fails in .*test_reward_columns.py") as caught:
        score(Mine(), ["a"], ["b"])
    assert "a function gets" not in str(caught.value)


# ---- a column that is missing

@pytest.mark.parametrize("reward, name", [
    (exact, "exact"), (KeywordOnly(), "KeywordOnly"), (WeightedSum((1, Length(2)), (1, exact)), "exact")])
@pytest.mark.parametrize("rows, line", [
    ([{"prompt": "a", "reply": "b"}], 1), ([ROWS[0], {"prompt": "a", "reply": "b"}], 2)])
@pytest.mark.parametrize("held_out", [False, True])
def test_missing_column_is_named_before_sampling(reward, name, rows, line, held_out, tmp_path):
    "The reward, the column, the file with its line, and the columns there are; in the held-out prompts too."
    (file := tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"validation_file": str(file)} if held_out else {"input_file": str(file)}
    with pytest.raises(DataError) as caught: task(reward, prompts=ROWS, batch=4, **files)
    check_sentence(str(caught.value), f'{file}, line {line}: there is no column "answer"',
                   f"the reward {name} needs", 'the row has "prompt", "reply"',
                   "add it, or give the parameter a default value")


def test_rows_that_lack_a_column_can_be_skipped():
    assert len(task(exact, prompts=[ROWS[0], {"prompt": "a"}], batch=2, on_bad_row="skip").data) == 1


def test_null_and_optional_columns_are_none():
    "As a dataset has it: null is a value, and a column that only some rows have is `None` in the others."
    seen = []
    def noted(prompt, response, answer, hint="no column"):
        seen.append((answer, hint))
        return 0.0
    for rows in (
        [{"prompt": "a", "answer": None}, {"prompt": "b", "answer": 1, "hint": "h"}],
        [{"prompt": "a", "answer": 2}],
    ):
        trainer = task(noted, prompts=rows, batch=2, response_length=1)
        trainer.sample(trainer.data, np.arange(len(rows)), {"temperature": 1.0}, 0)
    assert seen == [(None, None), (1, "h"), (2, "no column")]


def test_score_without_a_needed_column_is_an_error():
    for reward in (exact, KeywordOnly(), WeightedSum((1, exact))):
        with pytest.raises(RewardError) as caught: score(find_reward(reward), ["a"], ["b"])
        check_sentence(str(caught.value), 'needs the column "answer"')
    assert score(find_reward(exact), ["a"], ["b"], {"answer": ["A"], "more": [7]}).tolist() == [1.0]


def test_columns_are_those_after_preprocessing(tmp_path):
    (tmp_path / "edit.py").write_text("def edit(row): return {**row, 'answer': row['prompt'].upper()}\n")
    trainer = task(exact, prompts=[{"prompt": "a"}], batch=2, preprocess=f"{tmp_path}/edit.py:edit")
    assert trainer.sample(trainer.data, np.array([0]), {"temperature": 1.0}, 0).scores.tolist() == [1.0]


# ---- reward models

CHATML = ("{% for m in messages %}{{ '<bos>' + m['role'] + '\n' + m['content'] + '<eos>\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<bos>assistant\n' }}{% endif %}")
REFUSES = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
)


def judge(tmp_path, template=CHATML, fmt=PromptFormat(prompt_format=None)):
    ByteTokenizer().save(tmp_path / "tok")
    (tmp_path / "tok" / "chat_template.jinja").write_text(template)
    tok = HFTokenizer(tmp_path / "tok")
    return TrainedReward(ScalarLlama.from_llama(tiny("a" * (tok.vocab_size - 3)).model), tok, fmt)


def test_conversation_that_the_template_rejects_is_named_when_reading(tmp_path):
    "With its line, for a reward model and a part of a sum. Red if it is found during sampling."
    made, system = judge(tmp_path, REFUSES), {"role": "system", "content": "Be kind."}
    rows = [{"prompt": "a"}, {"prompt": [system, {"role": "user", "content": "b"}]}]
    (file := tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fmt = PromptFormat(prompt_format="{instruction}", input_field="prompt")
    for reward in (made, WeightedSum((1, Length(2)), (1, made))):
        with pytest.raises(DataError) as caught:
            read_prompts(file, ByteTokenizer(), fmt, 64, 4, check=functools.partial(check_row, reward))
        check_sentence(str(caught.value), f"{file}, line 2: the reward model cannot read this conversation",
                       "no system role")
    assert len(read_prompts(file, ByteTokenizer(), fmt, 64, 4,
                            check=functools.partial(check_row, Length(2)))) == 2


def test_warning_about_another_prompt_format(tmp_path, caplog):
    "Only if the reward model reads another format than its own; also as a part of a sum."
    plain = PromptFormat(prompt_format="<{instruction}>")
    columns = PromptFormat(prompt_format="{context}{instruction}")
    system = PromptFormat(prompt_format=None, system_prompt="Be kind.")
    foreign = PromptFormat(prompt_format="{prompt}")
    for own, policy, warning in (
            (plain, PromptFormat(), ""), (PromptFormat(prompt_format=None), plain, ""), (system, plain, ""),
            (columns, columns, ""), (plain, columns, "has other columns than the instruction"),
            (foreign, plain, "it has no chat template"),
            (plain, system, "its own format has no system prompt")):
        made = judge(tmp_path, fmt=own)
        for reward in (made, WeightedSum((1, made), (1, of_two))):
            caplog.clear()
            reward.check_policy(policy, 8)
            assert warning in caplog.text and bool(warning) == bool(caplog.text), (own, policy, caplog.text)


def test_classifier_with_two_labels_is_rejected(tmp_path):
    judge(tmp_path).save(tmp_path / "rm")
    config = json.loads((tmp_path / "rm/config.json").read_text())
    for change in ({"num_labels": 2}, {"num_labels": ..., "id2label": {"0": "bad", "1": "good"}}):
        changed = {key: value for key, value in {**config, **change}.items() if value is not ...}
        (tmp_path / "rm/config.json").write_text(json.dumps(changed))
        with pytest.raises(PretrainedError) as caught: load_reward(tmp_path / "rm")
        check_sentence(str(caught.value), "a classifier with 2 labels")
