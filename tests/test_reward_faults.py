"What can go wrong with rewards, learned or written: one sentence with file, line or key, and the remedy; no traceback, nothing lost."
import json
from pathlib import Path

import numpy as np
import pytest

from mlx_pretrain import reward as reward_module
from mlx_pretrain.cli import main
from mlx_pretrain.config import UserError
from mlx_pretrain.model import Llama, LlamaArgs
from mlx_pretrain.ppo import PPOConfig, PPOTrainer, ppo
from mlx_pretrain.pretrained import export
from mlx_pretrain.reward import RewardConfig, train_reward
from mlx_pretrain.reward_model import load_reward
from mlx_pretrain.run import checkpoints, read_metadata
from mlx_pretrain.tokenizer import ByteTokenizer
import mlx.core as mx
from mlx.utils import tree_flatten

PAIRS = [{"prompt": f"p{i}", "chosen": "aa" + "b" * i, "rejected": "b" + "c" * i} for i in range(6)]


class Home:
    "A working directory with a model to begin with; configurations are written as needed."
    def __init__(self, path, capsys): self.path, self.capsys = path, capsys

    def write(self, name, rows):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (self.path / name).write_text("".join(f"{line}\n" for line in lines))
        return name

    def config(self, name, rows, held_out=None, steps=2, hyper=None, data=None, training=None, **more):
        data = {"input_file": self.write(f"{name}.jsonl", rows), **(data or {})}
        if held_out is not None: data["validation_file"] = self.write(f"{name}-held.jsonl", held_out)
        hyper = {"batch_size": 4, "iters": steps, "learning_rate": 1e-3, **(hyper or {})}
        logging = {"steps": {"logging_interval": 1, "validation_interval": 2}, **more.pop("logging", {})}
        return {"name": name, "pretrained_model": "base", "data": data,
                "training": {"hyperparameters": hyper, **(training or {})}, "logging": logging, **more}

    def reward(self, rows=PAIRS, held_out=None, name="new", data=None, **more):
        return self.config(name, rows, held_out, data={"response_length": 4, "normalization_samples": 8,
                                                       **(data or {})}, **more)

    def ppo(self, name="new", data=None, rows=({"prompt": "a"}, {"prompt": "bc"}), **more):
        return self.config(name, rows, data={"response_length": 4, "ppo_mini_batch_size": 4, **(data or {})},
                           **more)

    def sft(self, name="new", **more): return self.config(name, [{"prompt": "a", "completion": "b"}], **more)

    def faulty(self, fault, when):
        "A file with a reward that fails when it is asked for that time; a file with the same text would be the same module."
        (self.path / "faulty.py").write_text(CLASS.format(fault=fault, when=when, place=self.path))

    def call(self, command, cfg, *words):
        "The command line; exit code and the last line of what it says to stderr."
        (self.path / "cfg.yaml").write_text(json.dumps(cfg))
        code = main([command, "--config", "cfg.yaml", *map(str, words)])
        said = self.capsys.readouterr()
        assert "Traceback" not in said.err + said.out
        return code, next((line
                           for line in reversed(said.err.splitlines()) if line.startswith("mlx-pretrain: ")),
                          "")

    def refused(self, command, cfg, *parts, words=()):
        "Exit code 2, one sentence that names these parts, and no run that was not there."
        before = self.runs()
        code, said = self.call(command, cfg, *words)
        assert code == 2 and self.runs() == before, (code, said, self.runs())
        for part in parts: assert part in said, (part, said)
        assert ". " not in said.replace("runs/", "") and "()" not in said and len(said) < 700, said
        return said

    def runs(self):
        return sorted(path.name
                      for path in (self.path / "runs").glob("*")) if (self.path / "runs").exists() else []


@pytest.fixture
def home(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = LlamaArgs(vocab_size=259, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                     num_attention_heads=2, num_key_value_heads=2, head_dim=8, max_position_embeddings=64)
    export(Llama(args), ByteTokenizer(), tmp_path / "base")
    return Home(tmp_path, capsys)


def user(text): return {"role": "user", "content": text}
def bot(text): return {"role": "assistant", "content": text}
def row(**fields): return {"prompt": "a", "chosen": "b", "rejected": "c", **fields}
def without(*names): return {key: value for key, value in row().items() if key not in names}


# ---- rows

TEXTS, LISTS = "must be a text", "both be texts, or both lists of messages"
BAD = {"no rejected": (without("rejected"), '"rejected"'),
       "a number for a response": (row(chosen=5), f'"chosen" {TEXTS}'),
       "null for a response": (row(rejected=None), f'"rejected" {TEXTS}'),
       "a number for a prompt": (row(prompt=7), '"prompt" must be a string'),
       "no prompt": (without("prompt"), '"prompt"'),
       "a margin in words": (row(margin="big"), '"margin" must be a number'),
       "true for a margin": (row(margin=True), '"margin" must be'),
       "an endless margin": (row(margin=1e15), '"margin" must be a number'),
       "NaN": ('{"prompt": "a", "chosen": "b", "rejected": "c", "margin": NaN}', "NaN"),
       "half a line": ('{"prompt": "a"', "not valid JSON"), "a list": ("[1]", "a list"),
       "unpaired surrogate": ('{"prompt": "a", "chosen": "\\ud83d", "rejected": "c"}', "surrogate"),
       "a text and a conversation": (row(chosen=[user("q"), bot("x")]), LISTS),
       "two questions": (row(chosen=[user("q"), bot("x")], rejected=[user("z"), bot("y")]),
                         "begin with different messages"),
       "no answer at the end": (row(chosen=[user("q"), user("x")], rejected=[user("q"), user("y")]),
                                "message of the assistant"),
       "empty conversations": (row(chosen=[], rejected=[]), LISTS),
       "messages that are no objects": (row(chosen=["q"], rejected=["q"]), LISTS),
       "an answer that is no text": (row(chosen=[user("q"), bot("x")], rejected=[user("q"), bot(None)]),
                                     "message of the assistant"),
       "a role nobody knows": (row(prompt=[{"role": "judge", "content": "q"}], chosen=[bot("x")],
                                   rejected=[bot("y")]), "role"),
       "tools": (row(prompt=[user("q")], chosen=[bot("x")], rejected=[bot("y")], tools=[1]), "tools"), }


@pytest.mark.parametrize("bad, part", BAD.values(), ids=BAD)
def test_a_bad_row_is_named_or_skipped(bad, part, home):
    "In the third line: file, line, and what is wrong; skipped if that is wanted. Red if a row is taken that means nothing."
    home.refused("reward", home.reward([*PAIRS[:2], bad]), "new.jsonl, line 3", part)
    code, _ = home.call("reward", home.reward([*PAIRS[:2], bad], data={"on_bad_row": "skip"}))
    source = read_metadata("runs/new")["data"]["input_file"]
    assert code == 0 and (source["kept"], source["skipped"]) == (2, 1)


@pytest.mark.parametrize("bad", [without("rejected"), {"prompt": "a"}, "[1]", row(chosen=5)], ids=str)
def test_a_bad_first_row_can_be_skipped(bad, home):
    "It is as bad as a later one. Red as long as the first row must say what all are."
    home.refused("reward", home.reward([bad, *PAIRS]), "new.jsonl, line 1")
    code, said = home.call("reward", home.reward([bad, *PAIRS], data={"on_bad_row": "skip"}))
    assert code == 0, said


SINGLE = {"prompt": "a", "completion": "b", "reward": 1.0}


@pytest.mark.parametrize("bad, part", [
    ({**SINGLE, "reward": "x"}, '"reward" must be a number'), ({**SINGLE, "reward": None}, '"reward" must be a number'),
    ({"prompt": "a", "completion": "b"}, '"reward"'), ({"prompt": "a", "reward": 1}, '"completion"'), (PAIRS[0], '"completion"')])
def test_a_bad_single_response_is_named(bad, part, home):
    home.refused("reward", home.reward([SINGLE, bad]), "new.jsonl, line 2", part)


FORMS = [{"prompt": "a", "response": "b", "reward": 0.5},
         {"instruction": "a", "response": "b", "reward": 0.5},
         {"instruction": "a", "output": "b", "reward": 0.5}, SINGLE]


@pytest.mark.parametrize("first", FORMS, ids=lambda first: "-".join(first))
def test_single_responses_in_their_usual_columns(first, home):
    "With no field named: those of the documentation, and those that PPO takes with their rewards."
    code, said = home.call("reward", home.reward([first, {**first, "reward": -1.0}]))
    assert code == 0, said


@pytest.mark.parametrize("first", [{"messages": [user("q"), bot("a")], "reward": 0.5},
                                   {"prompt": [user("q")], "completion": [bot("a")], "reward": 0.5}], ids=lambda first: "-".join(first))
def test_single_answers_of_conversations(first, home):
    "PPO takes such rows with their rewards, and pairs may be conversations too."
    assert home.call("rl", home.ppo("al", rows=[first, {**first, "reward": -1.0}]))[0] == 0
    code, said = home.call("reward", home.reward([first, {**first, "reward": -1.0}]))
    assert code == 0, said


def test_pairs_without_a_prompt_are_told_what_is_missing(home):
    "Texts that hold the whole talk, as older data sets have them: the sentence is about a prompt, not about question and answer."
    talk = "\n\nHuman: q\n\nAssistant: "
    said = home.refused("reward", home.reward([{"chosen": f"{talk}a", "rejected": f"{talk}b"}]), "line 1")
    assert '"prompt"' in said and "output_field" not in said


def test_equal_responses_are_left_out(home):
    "Counted, and named if nothing else is there."
    assert home.call("reward", home.reward([*PAIRS, row(rejected="b")]))[0] == 0
    assert read_metadata("runs/new")["data"]["input_file"]["tied"] == 1
    code, said = home.call("reward", home.reward([row(rejected="b")], name="none"))
    assert code == 2 and "none.jsonl" in said and "identical responses" in said and home.runs() == ["new"]


@pytest.mark.parametrize("place", ["input_file", "validation_file"])
def test_a_sentence_about_equal_responses_ends_in_its_remedy(place, home):
    same = [row(rejected="b")]
    said = home.refused("reward", home.reward(*([same] if place == "input_file" else [PAIRS, same])),
                        "identical responses")
    assert said.rpartition("; ")[2].startswith("mend")


def test_a_function_on_rows_that_breaks_a_text(home):
    "What a `preprocess` returns is checked like what a file holds: file and line, and it can be skipped."
    Path("edit.py").write_text(
        "def edit(row): return {**row, 'chosen': '\\ud83d'} if row['prompt'] == 'p2' else row\n"
    )
    home.refused("reward", home.reward(data={"preprocess": "edit.py:edit"}), "new.jsonl, line 3")
    assert home.call("reward", home.reward(data={"preprocess": "edit.py:edit", "on_bad_row": "skip"}))[0] == 0


def test_a_prompt_that_holds_the_answer(home):
    "The reward model would read the answer in the question; PPO could never ask so."
    home.refused("reward", home.reward(data={"prompt_format": "{instruction} {chosen}"}),
                 "data.prompt_format", "chosen")


@pytest.mark.parametrize("held_out, part", [([], "holds no rows"), (["", "\n"], "holds no rows"), ([SINGLE], 'no field "chosen"'),
                                            ([row(chosen="b" * 99)], "max_context_size")])
def test_a_useless_validation_file(held_out, part, home):
    "Said before anything is trained."
    home.refused("reward", home.reward(held_out=held_out), "new-held.jsonl", part)


def test_missing_files_are_named_by_their_keys(home):
    home.refused("reward", home.reward(data={"input_file": "nowhere.jsonl"}), '"data.input_file"',
                 "nowhere.jsonl")
    home.refused("reward", home.reward(data={"validation_file": "nowhere.jsonl"}), '"data.validation_file"',
                 "nowhere.jsonl")
    home.refused("reward", home.reward(data={"input_file": None}), '"data.input_file"', "missing")


def test_rows_too_long(home):
    "One is left out and counted; if all are, the sentence says which key; a context beyond the model's is refused."
    assert home.call("reward", home.reward([*PAIRS, row(prompt="x" * 99), row(rejected="x" * 99)]))[0] == 0
    assert read_metadata("runs/new")["data"]["input_file"]["dropped"] == 2
    home.refused("reward", home.reward([row(prompt="x" * 99)], name="none"), "none.jsonl",
                 '"data.preprocessing.max_context_size" (64)')
    home.refused("reward", home.reward(name="none", data={"preprocessing": {"max_context_size": 65}}),
                 "max_context_size", "at most 64")


def test_a_response_length_that_leaves_no_prompt(home):
    "It is known before the first step that nothing can be normalised. Red if that is said after the training."
    home.refused("reward", home.reward(data={"response_length": 64}), '"data.response_length"', "lower")


@pytest.mark.parametrize("rows", [
    [row(prompt="é🙂 日本", chosen="\u2028\0", rejected="e\u0301"), row(prompt="<eos>", chosen="<pad>", rejected="<bos>")],
    [row(prompt="", chosen="", rejected="b"), row(prompt=" ", chosen=" ", rejected="")],
    [row(margin=1e14), row(margin=1e-30)],
    [{**SINGLE, "reward": 1e14}, {**SINGLE, "reward": -1e14}]], ids=["unicode", "empty responses", "huge margins", "huge rewards"])
def test_odd_rows_that_are_right_train(rows, home):
    "To the end, with finite weights, and the result can be asked."
    code, said = home.call("reward", home.reward(rows, rows))
    assert code == 0, said
    assert all(abs(x) < 1e15 for x in load_reward("new").compute_reward(["", "é"], ["", "🙂\0"]).tolist())


# ---- configuration

@pytest.mark.parametrize("section, key, part", [
    ("data", {"kl_coef": 0.1}, '"data.kl_coef"'), ("data", {"mask_prompt": True}, '"data.mask_prompt"'),
    ("training", {"lora": {"rank": 2}}, '"training.lora"'), ("training", {"center_rewards_coefficient": -1}, "center_rewards_coefficient"),
    ("data", {"normalization_samples": -1}, '"data.normalization_samples"'), ("data", {"response_length": 0}, '"data.response_length"'),
    ("data", {"response_format": "{chosen}"}, '"data.response_format"'), ("training", {"freeze": ["nothing"]}, '"training.freeze"'),
    ("training", {"freeze": [0], "train_only": ["score"]}, "freeze"),
    pytest.param("logging", {"log_dir": "held_out.json"}, "log_dir")])
def test_a_key_that_cannot_be(section, key, part, home):
    "Of another stage, or out of range."
    home.refused("reward", home.reward(held_out=PAIRS, **{section: key}), part)


def test_a_key_of_the_reward_stage_in_another(home):
    home.refused("rl", home.ppo(data={"chosen_field": "x"}), '"data.chosen_field"')
    home.refused("rl", home.ppo(training={"center_rewards_coefficient": 0.1}),
                 '"training.center_rewards_coefficient"')
    home.refused("sft", home.sft(reward_model="x"), '"reward_model"')
    home.refused("reward", home.reward(reward_model="x"), '"reward_model"')


def test_a_reward_model_begins_with_a_model(home):
    home.refused("reward", home.reward(pretrained_model=None), '"pretrained_model" is missing')
    home.refused("reward", home.reward(pretrained_model="runs/nothing"), "runs/nothing")


@pytest.mark.parametrize("training, part", [
    ({"lora": {"rank": 2, "dropout": 0.1}}, "lora.dropout"), ({"lora": {"rank": 2}, "freeze": [0]}, "freeze"),
    ({"lora": {"rank": 2}, "train_only": [0]}, "train_only"), ({"lora": {"alpha": 4}}, "rank is 0"),
    ({"lora": {"rank": 2, "num_layers": 7}}, "lora.num_layers"), ({"lora": {"rank": 2, "targets": ["k"]}}, "lora.targets")])
def test_adapters_that_ppo_cannot_have(training, part, home):
    Path("r.py").write_text("def f(prompt, response): return len(response)\n")
    home.refused("rl", home.ppo(training=training, reward_model="r.py:f"), part)


def test_adapters_need_the_model_that_they_were_trained_beside(home):
    "Another rank, no adapters any more, another base: each is named, and the run stays as it was."
    Path("r.py").write_text("def f(prompt, response): return len(response)\n")
    def cfg(**more):
        return home.ppo("al", reward_model="r.py:f", **{"training": {"lora": {"rank": 2}}, **more})
    assert home.call("rl", cfg())[0] == 0
    go_on = ("--resume.checkpoint", "latest", "--training.hyperparameters.iters", 3)
    home.refused("rl", cfg(training={"lora": {"rank": 3}}), '"training.lora" was rank 2, and is rank 3',
                 words=go_on)
    home.refused("rl", cfg(training={}), '"training.lora" was rank 2, and is left out', words=go_on)
    export(Llama(LlamaArgs(vocab_size=259, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                           num_attention_heads=2, num_key_value_heads=2, head_dim=8,
                           max_position_embeddings=64), 1), ByteTokenizer(), "other")
    home.refused("rl", cfg(), '"pretrained_model"', words=(*go_on, "--pretrained_model", "other"))
    assert home.call("rl", cfg(), *go_on)[0] == 0


# ---- a learned reward in the wrong place

@pytest.fixture
def learned(home):
    "A finished run of a reward model, `runs/rm`."
    assert home.call("reward", home.reward(held_out=PAIRS, name="rm"))[0] == 0
    return home


def test_what_is_no_reward_model(learned):
    "Nothing there, a file, a checkpoint, a model that writes, a run that did not finish."
    def refused(spec, *parts): learned.refused("rl", learned.ppo(reward_model=str(spec)), *parts)
    refused("runs/nothing", "runs/nothing", "give the run of a reward model")
    refused("cfg.yaml", "cfg.yaml:Name")
    refused("nowhere.py:Name", "nowhere.py")
    refused(checkpoints("runs/rm")[-1], "is a checkpoint", "give the run")
    refused("base", "is a language model")
    assert learned.call("sft", learned.sft("taught"))[0] == 0
    refused("runs/taught", "runs/taught", "is a language model", "mlx-pretrain reward")
    refused("taught", "is a language model")
    Path("empty").mkdir()
    refused("empty", "empty", "holds no model")


def test_an_unfinished_reward_run_is_none(home, monkeypatch):
    "It has a checkpoint, and perhaps an older model; PPO with either would not be what the run will say."
    with monkeypatch.context() as patch:
        patch.setattr(reward_module.RewardTrainer, "finalize",
                      lambda self, run: (_ for _ in ()).throw(KeyboardInterrupt()))
        assert home.call("reward", home.reward(name="rm"))[0] == 130
    home.refused("rl", home.ppo(reward_model="runs/rm"), "runs/rm has no finished model yet",
                 "train it to its end")
    code, said = home.call("reward", home.reward(name="rm"), "--resume.checkpoint", "latest")
    assert code == 0, said
    assert home.call("rl", home.ppo(reward_model="runs/rm"))[0] == 0


@pytest.mark.parametrize("what", ["runs/rm", "runs/rm/model", "checkpoint"])
def test_a_reward_run_writes_nothing(what, learned):
    "Given as the model to begin with, or to write: the sentence says what it is, and where it belongs."
    path = str(checkpoints("runs/rm")[-1]) if what == "checkpoint" else what
    for command, cfg in (
        ("sft", learned.sft()),
        ("rl", learned.ppo(reward_model="rm")),
        ("reward", learned.reward()),
    ):
        learned.refused(command, {**cfg, "pretrained_model": path}, "is a reward model", '"reward_model"')
    code, said = main(["generate", "--run", path, "--prompt", "x"]), learned.capsys.readouterr().err
    assert code == 2 and "is a reward model" in said and "Traceback" not in said


def test_a_damaged_reward_model_is_told(learned):
    "Weights that are gone, or a spread of zero."
    file = Path("runs/rm/model/config.json")
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "mlx_pretrain_reward": {"mean": 0.0, "std": 0.0}}))
    learned.refused("rl", learned.ppo(reward_model="rm"), "config.json", "std above 0")
    file.write_text("{")
    learned.refused("rl", learned.ppo(reward_model="rm"), "config.json")


def test_a_mean_and_a_spread_that_are_no_object(learned):
    file = Path("runs/rm/model/config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "mlx_pretrain_reward": "much"}))
    learned.refused("rl", learned.ppo(reward_model="rm"), "config.json")


def test_weights_of_a_reward_model_that_are_gone(learned):
    Path("runs/rm/model/model.safetensors").unlink()
    learned.refused("rl", learned.ppo(reward_model="rm"), "runs/rm/model", "safetensors")


def test_a_run_does_not_replace_its_own_reward(learned):
    "Even with `overwrite`: it could not go on. Red if the reward model that a run asks is gone after it."
    before = Path("runs/rm/model/config.json").read_text()
    code, said = learned.call("rl", learned.ppo("rm", reward_model="rm"), "--overwrite")
    assert Path("runs/rm/model/config.json").read_text() == before and code == 2 and '"reward_model"' in said


def test_a_reward_run_is_not_replaced_by_accident(learned):
    before = Path("runs/rm/held_out.json").read_bytes()
    learned.refused("reward", learned.reward(name="rm"), "runs/rm exists already", "overwrite")
    learned.refused("reward", learned.reward(name="rm", pretrained_model="missing"), "runs/rm exists already")
    assert Path("runs/rm/held_out.json").read_bytes() == before
    assert learned.call("reward", learned.reward(name="rm"),
                        "--overwrite")[0] == 0 and not Path("runs/rm/held_out.json").exists()


def test_going_on_with_another_stage_or_tokenizer(learned):
    "A checkpoint of a reward model is none for PPO, and the other way round."
    reward_step = checkpoints("runs/rm")[-1]
    learned.refused("rl", learned.ppo(reward_model="rm"), "is a reward model",
                    words=("--resume.checkpoint", reward_step))
    assert learned.call("rl", learned.ppo("al", reward_model="rm"))[0] == 0
    policy_step = checkpoints("runs/al")[-1]
    learned.refused("reward", learned.reward(), "another stage (ppo)",
                    words=("--resume.checkpoint", policy_step))


def test_going_on_with_another_reward(learned, caplog):
    "None at all is a mistake; another one is told, and the best is counted anew; the same one, named otherwise, is the same."
    assert learned.call("rl", learned.ppo("al", reward_model="rm"))[0] == 0
    go_on = ("--resume.checkpoint", "latest", "--training.hyperparameters.iters")
    asked = learned.ppo("al", rows=[{"prompt": "a", "completion": "b", "reward": 1.0}] * 2)
    learned.refused("rl", asked, "was trained with the reward", '"reward_model"', words=(*go_on, 3))
    Path("r.py").write_text("def f(prompt, response): return len(response)\n")
    assert learned.call("rl", learned.ppo("al", reward_model="r.py:f"), *go_on,
                        3)[0] == 0 and "another one" in caplog.text


def test_a_policy_that_is_asked_in_another_form(learned, caplog):
    "The reward model has read bare prompts and reads them now, not \"### Instruction:\" around each; where it cannot, that is said."
    asked = learned.ppo("other", reward_model="rm",
                        data={"prompt_format": "### Instruction:\n{instruction}\n\n### Response:"})
    trainer = PPOTrainer(PPOConfig.model_validate_json(json.dumps(asked)))
    said = trainer.sample(trainer.data, np.arange(2), {"temperature": 1.0}, 0)
    bare = load_reward("rm").compute_reward(["a", "bc"], said.response_texts)
    assert said.prompt_texts[1] == "### Instruction:\nbc\n\n### Response:" and said.scores.tolist() == bare.tolist()
    assert (
        load_reward("rm").compute_reward(said.prompt_texts, said.response_texts).tolist() != bare.tolist()
        and "may mean little" not in caplog.text
    )
    rows = [{"prompt": "a", "context": "b"}]
    assert learned.call("rl", learned.ppo("more", reward_model="rm", rows=rows,
                                          data={"prompt_format": "{context} {instruction}"}))[0] == 0
    assert any("reward" in record.message and "prompt_format" in record.message for record in caplog.records)


def test_a_reward_named_by_its_path_is_the_same(learned, caplog):
    "A run's name, and later its whole path. Red if the best is forgotten for that."
    assert learned.call("rl", learned.ppo("al", reward_model="rm"))[0] == 0
    same = learned.ppo("al", reward_model=str(Path("runs/rm").resolve()))
    assert learned.call("rl", same, "--resume.checkpoint", "latest", "--training.hyperparameters.iters",
                        3)[0] == 0
    assert "another one" not in caplog.text


def test_a_full_disk_at_the_end_is_told(home, monkeypatch):
    "What is known of the held-out rows is written like everything else: a sentence if the disk refuses."
    def full(path, data): raise OSError(28, "No space left on device")
    monkeypatch.setattr(reward_module, "atomic_write", full)
    code, said = home.call("reward", home.reward(held_out=PAIRS))
    assert code == 2 and "No space left" in said


def test_a_damaged_file_of_held_out_rows_is_passed_over(learned):
    "Curves can be drawn without it."
    Path("runs/rm/held_out.json").write_text("[1]")
    assert main(["plot", "runs/rm"]) == 0 and Path("runs/rm/curve.png").is_file()


def test_runs_of_two_kinds_are_not_drawn_together(learned):
    "A reward model and a policy."
    assert learned.call("rl", learned.ppo("al", reward_model="rm"))[0] == 0
    assert main(["plot", "runs/rm", "runs/al"]) == 2 and "one kind" in learned.capsys.readouterr().err
    assert main(["plot", "runs/rm"]) == 0


# ---- a reward that fails in the middle of a training

FAULTY = {"raises": ("raise OSError('the server is gone')", ["the server is gone", "faulty.py, line"]),
          "NaN": ("return float('nan')", ["gave nan", "finite number"]),
          "infinity": ("return float('inf')", ["gave inf", "finite number"]),
          "too many": ("return 'many'", ["for 4 responses", "return one number for each"]),
          "too few": ("return 'few'", ["for 4 responses", "return one number for each"]),
          "texts": ("return '0.5'", ["not numbers"]), "nothing": ("return None", ["return"]),
          "a dictionary": ("return {'score': 1}", ["an object", "return a list"])}
CLASS = """# {place}
calls = []
class Faulty:
    def one(self):
        {fault}
    def compute_reward(self, prompts, responses):
        calls.append(1)
        if len(calls) != {when}: return [0.1 * len(r) for r in responses]
        found = self.one()
        if found == 'many': return [1.0] * (len(responses) + 1)
        if found == 'few': return [1.0]
        return found if isinstance(found, dict) else [found] * len(responses)
"""


@pytest.mark.parametrize("fault, parts", FAULTY.values(), ids=FAULTY)
@pytest.mark.parametrize("lora", [0, 2])
def test_a_reward_that_fails_loses_nothing(fault, parts, lora, home):
    "In the third step, after two of the forecast: one sentence, the steps before are saved, and mended it goes on to the end."
    cfg = home.ppo("al", steps=4, reward_model="faulty.py:Faulty", data={"ppo_epochs": 1},
                   training={"lora": {"rank": lora}})
    home.faulty(fault, 5)
    code, said = home.call("rl", cfg)
    assert code == 2 and said.startswith("mlx-pretrain: the reward Faulty"), said
    for part in parts: assert part in said, (part, said)
    assert [path.name for path in checkpoints("runs/al")] == ["step_000002"] and read_metadata("runs/al")[
        "outcome"
    ] == "failed"
    home.faulty(fault, -1)
    code, said = home.call("rl", cfg, "--resume.checkpoint", "latest")
    assert code == 0 and checkpoints("runs/al")[-1].name == "step_000004", said


def test_a_reward_that_fails_at_once_leaves_no_run(home):
    "In the forecast, before anything is written."
    home.faulty("return float('nan')", 1)
    home.refused("rl", home.ppo(reward_model="faulty.py:Faulty"), "the reward Faulty gave nan")


def test_a_part_of_a_sum_that_fails_is_named(home):
    "A file with a sum of rules, given by its name; the part that is wrong is told, with its line."
    Path("sums.py").write_text(
        "from mlx_pretrain.rules import Length, WeightedSum\n\n\ndef odd(prompt, response):\n    return 1 / 0\n\n\n"
        "taste = WeightedSum((1, Length(2)), (1, odd))\nbroken = 7\n"
    )
    home.refused("rl", home.ppo(reward_model="sums.py:taste"), "the reward odd fails", "sums.py, line 5")
    home.refused("rl", home.ppo(reward_model="sums.py:broken"), "sums.py:broken")
    home.refused("rl", home.ppo(reward_model="sums.py:tast"), "did you mean")
    Path("sums.py").write_text(
        "from mlx_pretrain.rules import Length\n\ntaste = Length(2)\nwrong = Length('2')\n"
    )
    home.refused("rl", home.ppo(reward_model="sums.py:taste"), "sums.py", "line 4")


def test_a_rule_that_wants_to_be_told_something(home):
    "A class with arguments cannot be named alone. The sentence names it."
    code, said = home.call("rl", home.ppo(reward_model="mlx_pretrain.rules:Length"))
    assert (
        code == 2
        and "mlx_pretrain.rules:Length needs arguments" in said
        and "words" in said
        and home.runs() == []
    )
    assert "make an object in a file of yours, such as name = Length(…)" in said
    Path("mine.py").write_text("from mlx_pretrain.rules import Length\nname = Length(3)\n")
    assert home.call("rl", home.ppo("mine", reward_model="mine.py:name"))[0] == 0
    assert home.call("rl", home.ppo(reward_model="mlx_pretrain.rules:Sentiment"))[0] == 0


def test_python_gets_the_same_sentences(home):
    "As errors of one kind, from the classes and from the functions."
    def cfg(kind, made): return kind.model_validate_json(json.dumps(made))
    rewarded, asked = cfg(RewardConfig, home.reward([without("rejected")])), cfg(PPOConfig, home.ppo())
    for call in (lambda: train_reward(rewarded), lambda: PPOTrainer(asked, reward=7), lambda: PPOTrainer(asked, reward="runs/nothing"),
                 lambda: ppo(asked, reward="nowhere:f"), lambda: ppo(asked, reward=lambda prompt, response: None)):
        with pytest.raises(UserError) as caught: call()
        assert "\n" not in str(caught.value)
    assert home.runs() == []


def test_memory_does_not_grow_with_the_steps(learned):
    "A learned reward is asked in every step; arrays are not held on to."
    trainer = PPOTrainer(
        PPOConfig.model_validate_json(json.dumps(learned.ppo(steps=30, data={"ppo_epochs": 1}))), reward="rm"
    )
    held = []
    for _ in range(6):
        for _ in range(2): trainer.step()
        mx.eval(trainer.trained.parameters(), trainer.optimizer.state)
        held.append(mx.get_active_memory())
    size = sum(w.nbytes for _, w in tree_flatten(trainer.model.parameters()))
    assert held[-1] - held[1] < size
