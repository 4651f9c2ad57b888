"Errors of reward models and reward functions: one sentence with file, line or key, and the remedy."
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
    "A working directory with a base model; configurations are written as needed."
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
        "Write a reward that fails at its call number `when`; the path makes the module unique."
        (self.path / "faulty.py").write_text(CLASS.format(fault=fault, when=when, place=self.path))

    def call(self, command, cfg, *words):
        "Run a command; exit code and the last message on stderr."
        (self.path / "cfg.yaml").write_text(json.dumps(cfg))
        code = main([command, "--config", "cfg.yaml", *map(str, words)])
        output = self.capsys.readouterr()
        assert "Traceback" not in output.err + output.out
        messages = [line for line in output.err.splitlines() if line.startswith("mlx-pretrain: ")]
        return code, messages[-1] if messages else ""

    def refused(self, command, cfg, *parts, words=()):
        "Exit code 2, one sentence that contains these parts, and no new run."
        before = self.runs()
        code, message = self.call(command, cfg, *words)
        assert code == 2 and self.runs() == before, (code, message, self.runs())
        for part in parts: assert part in message, (part, message)
        assert ". " not in message.replace("runs/", "") and "()" not in message, message
        assert len(message) < 700, message
        return message

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
       "an unknown role": (row(prompt=[{"role": "judge", "content": "q"}], chosen=[bot("x")],
                                   rejected=[bot("y")]), "role"),
       "tools": (row(prompt=[user("q")], chosen=[bot("x")], rejected=[bot("y")], tools=[1]), "tools"), }


@pytest.mark.parametrize("bad, part", BAD.values(), ids=BAD)
def test_a_bad_row_is_named_or_skipped(bad, part, home):
    "In the third line: file, line, and what is wrong; or skipped. Red if an invalid row is used."
    home.refused("reward", home.reward([*PAIRS[:2], bad]), "new.jsonl, line 3", part)
    code, _ = home.call("reward", home.reward([*PAIRS[:2], bad], data={"on_bad_row": "skip"}))
    source = read_metadata("runs/new")["data"]["input_file"]
    assert code == 0 and (source["kept"], source["skipped"]) == (2, 1)


@pytest.mark.parametrize("bad", [without("rejected"), {"prompt": "a"}, "[1]", row(chosen=5)], ids=str)
def test_a_bad_first_row_can_be_skipped(bad, home):
    "Like a later one. Red if the first row always decides what rows are."
    home.refused("reward", home.reward([bad, *PAIRS]), "new.jsonl, line 1")
    code, message = home.call("reward", home.reward([bad, *PAIRS], data={"on_bad_row": "skip"}))
    assert code == 0, message


SINGLE = {"prompt": "a", "completion": "b", "reward": 1.0}


@pytest.mark.parametrize("bad, part", [
    ({**SINGLE, "reward": "x"}, '"reward" must be a number'),
    ({**SINGLE, "reward": None}, '"reward" must be a number'),
    ({"prompt": "a", "completion": "b"}, '"reward"'), ({"prompt": "a", "reward": 1}, '"completion"'),
    (PAIRS[0], '"completion"')])
def test_a_bad_single_response_is_named(bad, part, home):
    home.refused("reward", home.reward([SINGLE, bad]), "new.jsonl, line 2", part)


FORMS = [{"prompt": "a", "response": "b", "reward": 0.5},
         {"instruction": "a", "response": "b", "reward": 0.5},
         {"instruction": "a", "output": "b", "reward": 0.5}, SINGLE]


@pytest.mark.parametrize("first", FORMS, ids=lambda first: "-".join(first))
def test_single_responses_in_their_usual_columns(first, home):
    "With no field named: those of the documentation, and those that PPO reads with rewards."
    code, message = home.call("reward", home.reward([first, {**first, "reward": -1.0}]))
    assert code == 0, message


@pytest.mark.parametrize("first", [{"messages": [user("q"), bot("a")], "reward": 0.5},
                                   {"prompt": [user("q")], "completion": [bot("a")], "reward": 0.5}],
                         ids=lambda first: "-".join(first))
def test_single_answers_of_conversations(first, home):
    "PPO reads such rows with rewards, and pairs may be conversations too."
    assert home.call("rl", home.ppo("al", rows=[first, {**first, "reward": -1.0}]))[0] == 0
    code, message = home.call("reward", home.reward([first, {**first, "reward": -1.0}]))
    assert code == 0, message


def test_missing_prompt_of_pairs_is_named(home):
    "Texts of complete conversations, as in older datasets: the message is about the prompt column."
    talk = "\n\nHuman: q\n\nAssistant: "
    message = home.refused("reward", home.reward([{"chosen": f"{talk}a", "rejected": f"{talk}b"}]), "line 1")
    assert '"prompt"' in message and "output_field" not in message


def test_equal_responses_are_dropped(home):
    "They are counted, and named if there are no other rows."
    assert home.call("reward", home.reward([*PAIRS, row(rejected="b")]))[0] == 0
    assert read_metadata("runs/new")["data"]["input_file"]["tied"] == 1
    code, message = home.call("reward", home.reward([row(rejected="b")], name="none"))
    assert code == 2 and "none.jsonl" in message and "identical responses" in message
    assert home.runs() == ["new"]


@pytest.mark.parametrize("place", ["input_file", "validation_file"])
def test_message_about_equal_responses_ends_with_a_remedy(place, home):
    same = [row(rejected="b")]
    message = home.refused("reward", home.reward(*([same] if place == "input_file" else [PAIRS, same])),
                        "identical responses")
    assert message.rpartition("; ")[2].startswith("fix")


def test_invalid_row_from_preprocess_is_named_or_skipped(home):
    "What `preprocess` returns is checked like the rows of a file."
    Path("edit.py").write_text(
        "def edit(row): return {**row, 'chosen': '\\ud83d'} if row['prompt'] == 'p2' else row\n"
    )
    home.refused("reward", home.reward(data={"preprocess": "edit.py:edit"}), "new.jsonl, line 3")
    assert home.call("reward", home.reward(data={"preprocess": "edit.py:edit", "on_bad_row": "skip"}))[0] == 0


def test_prompt_format_with_the_chosen_response_is_rejected(home):
    "The reward model would read the label in the prompt; PPO could never provide it."
    home.refused("reward", home.reward(data={"prompt_format": "{instruction} {chosen}"}),
                 "data.prompt_format", "chosen")


@pytest.mark.parametrize("held_out, part", [
    ([], "holds no rows"), (["", "\n"], "holds no rows"), ([SINGLE], 'no field "chosen"'),
    ([row(chosen="b" * 99)], "max_context_size")])
def test_useless_validation_file_is_rejected(held_out, part, home):
    "Before any training."
    home.refused("reward", home.reward(held_out=held_out), "new-held.jsonl", part)


def test_missing_files_are_named_by_their_keys(home):
    home.refused("reward", home.reward(data={"input_file": "nowhere.jsonl"}), '"data.input_file"',
                 "nowhere.jsonl")
    home.refused("reward", home.reward(data={"validation_file": "nowhere.jsonl"}), '"data.validation_file"',
                 "nowhere.jsonl")
    home.refused("reward", home.reward(data={"input_file": None}), '"data.input_file"', "missing")


def test_rows_that_are_too_long(home):
    "Dropped and counted; if all are, the message names the key; a context beyond the model's is rejected."
    assert home.call("reward", home.reward([*PAIRS, row(prompt="x" * 99), row(rejected="x" * 99)]))[0] == 0
    assert read_metadata("runs/new")["data"]["input_file"]["dropped"] == 2
    home.refused("reward", home.reward([row(prompt="x" * 99)], name="none"), "none.jsonl",
                 '"data.preprocessing.max_context_size" (64)')
    home.refused("reward", home.reward(name="none", data={"preprocessing": {"max_context_size": 65}}),
                 "max_context_size", "the context of the model, 64")


def test_response_length_that_leaves_no_room_for_prompts(home):
    "Rejected before the first step. Red if normalization fails after the training."
    home.refused("reward", home.reward(data={"response_length": 64}), '"data.response_length"', "lower")


@pytest.mark.parametrize("rows", [
    [row(prompt="é🙂 日本", chosen="\u2028\0", rejected="e\u0301"),
     row(prompt="<eos>", chosen="<pad>", rejected="<bos>")],
    [row(prompt="", chosen="", rejected="b"), row(prompt=" ", chosen=" ", rejected="")],
    [row(margin=1e14), row(margin=1e-30)],
    [{**SINGLE, "reward": 1e14}, {**SINGLE, "reward": -1e14}]],
    ids=["unicode", "empty responses", "huge margins", "huge rewards"])
def test_unusual_valid_rows_train(rows, home):
    "To the end, with finite rewards."
    code, message = home.call("reward", home.reward(rows, rows))
    assert code == 0, message
    assert all(abs(x) < 1e15 for x in load_reward("new").compute_reward(["", "é"], ["", "🙂\0"]).tolist())


# ---- configuration

@pytest.mark.parametrize("section, key, part", [
    ("data", {"kl_coef": 0.1}, '"data.kl_coef"'), ("data", {"mask_prompt": True}, '"data.mask_prompt"'),
    ("training", {"lora": {"rank": 2}}, '"training.lora"'),
    ("training", {"center_rewards_coefficient": -1}, "center_rewards_coefficient"),
    ("data", {"normalization_samples": -1}, '"data.normalization_samples"'),
    ("data", {"response_length": 0}, '"data.response_length"'),
    ("data", {"response_format": "{chosen}"}, '"data.response_format"'),
    ("training", {"freeze": ["nothing"]}, '"training.freeze"'),
    ("training", {"freeze": [0], "train_only": ["score"]}, "freeze"),
    pytest.param("logging", {"log_dir": "held_out.json"}, "log_dir")])
def test_invalid_key_is_named(section, key, part, home):
    "Of another stage, or out of range."
    home.refused("reward", home.reward(held_out=PAIRS, **{section: key}), part)


def test_reward_key_in_another_stage_is_rejected(home):
    home.refused("rl", home.ppo(data={"chosen_field": "x"}), '"data.chosen_field"')
    home.refused("rl", home.ppo(training={"center_rewards_coefficient": 0.1}),
                 '"training.center_rewards_coefficient"')
    home.refused("sft", home.sft(reward_model="x"), '"reward_model"')
    home.refused("reward", home.reward(reward_model="x"), '"reward_model"')


def test_pretrained_model_is_required(home):
    home.refused("reward", home.reward(pretrained_model=None), '"pretrained_model" is missing')
    home.refused("reward", home.reward(pretrained_model="runs/nothing"), "runs/nothing")


@pytest.mark.parametrize("training, part", [
    ({"lora": {"rank": 2, "dropout": 0.1}}, "lora.dropout"), ({"lora": {"rank": 2}, "freeze": [0]}, "freeze"),
    ({"lora": {"rank": 2}, "train_only": [0]}, "train_only"), ({"lora": {"alpha": 4}}, "rank is 0"),
    ({"lora": {"rank": 2, "num_layers": 7}}, "lora.num_layers"),
    ({"lora": {"rank": 2, "targets": ["k"]}}, "lora.targets")])
def test_invalid_lora_settings_of_ppo_are_named(training, part, home):
    Path("r.py").write_text("def f(prompt, response): return len(response)\n")
    home.refused("rl", home.ppo(training=training, reward_model="r.py:f"), part)


def test_resuming_lora_with_another_base_or_rank_is_rejected(home):
    "Another rank, no adapters, another base: each is named, and the run is unchanged."
    Path("r.py").write_text("def f(prompt, response): return len(response)\n")
    def cfg(**more):
        return home.ppo("al", reward_model="r.py:f", **{"training": {"lora": {"rank": 2}}, **more})
    assert home.call("rl", cfg())[0] == 0
    resume = ("--resume.checkpoint", "latest", "--training.hyperparameters.iters", 3)
    home.refused("rl", cfg(training={"lora": {"rank": 3}}), '"training.lora" was rank 2, and is rank 3',
                 words=resume)
    home.refused("rl", cfg(training={}), '"training.lora" was rank 2, and is left out', words=resume)
    export(Llama(LlamaArgs(vocab_size=259, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                           num_attention_heads=2, num_key_value_heads=2, head_dim=8,
                           max_position_embeddings=64), 1), ByteTokenizer(), "other")
    home.refused("rl", cfg(), '"pretrained_model"', words=(*resume, "--pretrained_model", "other"))
    assert home.call("rl", cfg(), *resume)[0] == 0


# ---- a reward model in the wrong place

@pytest.fixture
def learned(home):
    "A finished run of a reward model, `runs/rm`."
    assert home.call("reward", home.reward(held_out=PAIRS, name="rm"))[0] == 0
    return home


def test_path_that_is_not_a_reward_model_is_rejected(learned):
    "Nothing, a file, a checkpoint, a language model, an empty directory."
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


def test_unfinished_reward_run_is_rejected(home, monkeypatch):
    "It has a checkpoint, and perhaps an older model; PPO with either would not use the final reward."
    with monkeypatch.context() as patch:
        patch.setattr(reward_module.RewardTrainer, "finalize",
                      lambda self, run: (_ for _ in ()).throw(KeyboardInterrupt()))
        assert home.call("reward", home.reward(name="rm"))[0] == 130
    home.refused("rl", home.ppo(reward_model="runs/rm"), "runs/rm has no finished model yet",
                 "train it to its end")
    code, message = home.call("reward", home.reward(name="rm"), "--resume.checkpoint", "latest")
    assert code == 0, message
    assert home.call("rl", home.ppo(reward_model="runs/rm"))[0] == 0


@pytest.mark.parametrize("path", ["runs/rm", "runs/rm/model", "checkpoint"])
def test_reward_model_is_rejected_as_a_language_model(path, learned):
    "As the initial model, or for `generate`: the message says what it is, and where it belongs."
    if path == "checkpoint": path = str(checkpoints("runs/rm")[-1])
    for command, cfg in (
        ("sft", learned.sft()),
        ("rl", learned.ppo(reward_model="rm")),
        ("reward", learned.reward()),
    ):
        learned.refused(command, {**cfg, "pretrained_model": path}, "is a reward model", '"reward_model"')
    code = main(["generate", "--run", path, "--prompt", "x"])
    error = learned.capsys.readouterr().err
    assert code == 2 and "is a reward model" in error and "Traceback" not in error


def test_damaged_reward_model_is_reported(learned):
    "A standard deviation of zero, or invalid JSON."
    file = Path("runs/rm/model/config.json")
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "mlx_pretrain_reward": {"mean": 0.0, "std": 0.0}}))
    learned.refused("rl", learned.ppo(reward_model="rm"), "config.json", "std above 0")
    file.write_text("{")
    learned.refused("rl", learned.ppo(reward_model="rm"), "config.json")


def test_normalization_that_is_not_an_object_is_reported(learned):
    file = Path("runs/rm/model/config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "mlx_pretrain_reward": "much"}))
    learned.refused("rl", learned.ppo(reward_model="rm"), "config.json")


def test_missing_weights_of_a_reward_model_are_reported(learned):
    Path("runs/rm/model/model.safetensors").unlink()
    learned.refused("rl", learned.ppo(reward_model="rm"), "runs/rm/model", "safetensors")


def test_run_does_not_overwrite_its_own_reward_model(learned):
    "Even with `overwrite`: it could not be resumed. Red if the reward model is gone after it."
    before = Path("runs/rm/model/config.json").read_text()
    code, message = learned.call("rl", learned.ppo("rm", reward_model="rm"), "--overwrite")
    assert code == 2 and '"reward_model"' in message
    assert Path("runs/rm/model/config.json").read_text() == before


def test_reward_run_is_not_overwritten_by_accident(learned):
    before = Path("runs/rm/held_out.json").read_bytes()
    learned.refused("reward", learned.reward(name="rm"), "runs/rm exists already", "overwrite")
    learned.refused("reward", learned.reward(name="rm", pretrained_model="missing"), "runs/rm exists already")
    assert Path("runs/rm/held_out.json").read_bytes() == before
    assert learned.call("reward", learned.reward(name="rm"), "--overwrite")[0] == 0
    assert not Path("runs/rm/held_out.json").exists()


def test_resuming_another_stage_is_rejected(learned):
    "A checkpoint of a reward model with PPO, and vice versa."
    reward_step = checkpoints("runs/rm")[-1]
    learned.refused("rl", learned.ppo(reward_model="rm"), "is a reward model",
                    words=("--resume.checkpoint", reward_step))
    assert learned.call("rl", learned.ppo("al", reward_model="rm"))[0] == 0
    policy_step = checkpoints("runs/al")[-1]
    learned.refused("reward", learned.reward(), "another stage (ppo)",
                    words=("--resume.checkpoint", policy_step))


def test_resuming_ppo_with_another_reward(learned, caplog):
    "Without a reward: an error; with another one: a warning."
    assert learned.call("rl", learned.ppo("al", reward_model="rm"))[0] == 0
    resume = ("--resume.checkpoint", "latest", "--training.hyperparameters.iters")
    asked = learned.ppo("al", rows=[{"prompt": "a", "completion": "b", "reward": 1.0}] * 2)
    learned.refused("rl", asked, "was trained with the reward", '"reward_model"', words=(*resume, 3))
    Path("r.py").write_text("def f(prompt, response): return len(response)\n")
    assert learned.call("rl", learned.ppo("al", reward_model="r.py:f"), *resume,
                        3)[0] == 0 and "Reward changed since the checkpoint" in caplog.text


def test_policy_with_another_prompt_format(learned, caplog):
    "The reward model reads prompts in its own format, or warns if it cannot."
    asked = learned.ppo("other", reward_model="rm",
                        data={"prompt_format": "### Instruction:\n{instruction}\n\n### Response:"})
    trainer = PPOTrainer(PPOConfig.model_validate_json(json.dumps(asked)))
    samples = trainer.sample(trainer.data, np.arange(2), {"temperature": 1.0}, 0)
    prompts, responses = samples.prompt_texts, samples.response_texts
    bare = load_reward("rm").compute_reward(["a", "bc"], responses)
    assert prompts[1] == "### Instruction:\nbc\n\n### Response:" and samples.scores.tolist() == bare.tolist()
    assert load_reward("rm").compute_reward(prompts, responses).tolist() != bare.tolist()
    assert "may be unreliable" not in caplog.text
    rows = [{"prompt": "a", "context": "b"}]
    assert learned.call("rl", learned.ppo("more", reward_model="rm", rows=rows,
                                          data={"prompt_format": "{context} {instruction}"}))[0] == 0
    assert any("reward" in record.message and "prompt_format" in record.message for record in caplog.records)


def test_reward_named_by_its_path_is_the_same(learned, caplog):
    "A run's name, and later its full path. Red if the best is reset for that."
    assert learned.call("rl", learned.ppo("al", reward_model="rm"))[0] == 0
    same = learned.ppo("al", reward_model=str(Path("runs/rm").resolve()))
    assert learned.call("rl", same, "--resume.checkpoint", "latest", "--training.hyperparameters.iters",
                        3)[0] == 0
    assert "another one" not in caplog.text


def test_full_disk_at_the_end_is_reported(home, monkeypatch):
    "When the evaluation on held-out rows is written."
    def full(path, data): raise OSError(28, "No space left on device")
    monkeypatch.setattr(reward_module, "atomic_write", full)
    code, message = home.call("reward", home.reward(held_out=PAIRS))
    assert code == 2 and "No space left" in message


def test_plot_ignores_a_damaged_held_out_file(learned):
    "Curves can be drawn without it."
    Path("runs/rm/held_out.json").write_text("[1]")
    assert main(["plot", "runs/rm"]) == 0 and Path("runs/rm/curve.png").is_file()


def test_plot_rejects_runs_of_two_kinds(learned):
    "A reward model and a policy."
    assert learned.call("rl", learned.ppo("al", reward_model="rm"))[0] == 0
    assert main(["plot", "runs/rm", "runs/al"]) == 2 and "one kind" in learned.capsys.readouterr().err
    assert main(["plot", "runs/rm"]) == 0


# ---- a reward that fails during training

FAULTY = {"raises": ("raise OSError('the server is gone')", ["the server is gone", "faulty.py, line"]),
          "NaN": ("return float('nan')", ["returned nan", "finite number"]),
          "infinity": ("return float('inf')", ["returned inf", "finite number"]),
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
def test_failing_reward_loses_nothing(fault, parts, lora, home):
    "In the third step, after two of the forecast: earlier steps are saved, and the fixed run resumes."
    cfg = home.ppo("al", steps=4, reward_model="faulty.py:Faulty", data={"ppo_epochs": 1},
                   training={"lora": {"rank": lora}})
    home.faulty(fault, 5)
    code, message = home.call("rl", cfg)
    assert code == 2 and message.startswith("mlx-pretrain: the reward Faulty"), message
    for part in parts: assert part in message, (part, message)
    assert [path.name for path in checkpoints("runs/al")] == ["step_000002"]
    assert read_metadata("runs/al")["outcome"] == "failed"
    home.faulty(fault, -1)
    code, message = home.call("rl", cfg, "--resume.checkpoint", "latest")
    assert code == 0 and checkpoints("runs/al")[-1].name == "step_000004", message


def test_reward_that_fails_in_the_forecast_leaves_no_run(home):
    "In the forecast, before anything is written."
    home.faulty("return float('nan')", 1)
    home.refused("rl", home.ppo(reward_model="faulty.py:Faulty"), "the reward Faulty returned nan")


def test_failing_part_of_a_weighted_sum_is_named(home):
    "With its file and line."
    Path("sums.py").write_text(
        "from mlx_pretrain.rules import Length, WeightedSum\n\n\n"
        "def odd(prompt, response):\n    return 1 / 0\n\n\n"
        "taste = WeightedSum((1, Length(2)), (1, odd))\nbroken = 7\n"
    )
    home.refused("rl", home.ppo(reward_model="sums.py:taste"), "the reward odd fails", "sums.py, line 5")
    home.refused("rl", home.ppo(reward_model="sums.py:broken"), "sums.py:broken")
    home.refused("rl", home.ppo(reward_model="sums.py:tast"), "did you mean")
    Path("sums.py").write_text(
        "from mlx_pretrain.rules import Length\n\ntaste = Length(2)\nwrong = Length('2')\n"
    )
    home.refused("rl", home.ppo(reward_model="sums.py:taste"), "sums.py", "line 4")


def test_reward_class_that_needs_arguments_is_rejected(home):
    "The message shows how to make an object."
    code, message = home.call("rl", home.ppo(reward_model="mlx_pretrain.rules:Length"))
    assert (
        code == 2
        and "mlx_pretrain.rules:Length needs arguments" in message
        and "words" in message
        and home.runs() == []
    )
    assert "make an object in a file of yours, such as name = Length(…)" in message
    Path("mine.py").write_text("from mlx_pretrain.rules import Length\nname = Length(3)\n")
    assert home.call("rl", home.ppo("mine", reward_model="mine.py:name"))[0] == 0
    assert home.call("rl", home.ppo(reward_model="mlx_pretrain.rules:Sentiment"))[0] == 0


def test_python_api_raises_the_same_messages(home):
    "As `UserError`, from classes and functions."
    def cfg(kind, values): return kind.model_validate_json(json.dumps(values))
    rewarded, asked = cfg(RewardConfig, home.reward([without("rejected")])), cfg(PPOConfig, home.ppo())
    for call in (lambda: train_reward(rewarded), lambda: PPOTrainer(asked, reward=7),
                 lambda: PPOTrainer(asked, reward="runs/nothing"), lambda: ppo(asked, reward="nowhere:f"),
                 lambda: ppo(asked, reward=lambda prompt, response: None)):
        with pytest.raises(UserError) as caught: call()
        assert "\n" not in str(caught.value)
    assert home.runs() == []


def test_memory_does_not_grow_with_the_steps(learned):
    "A reward model is called in every step; its arrays are released."
    trainer = PPOTrainer(
        PPOConfig.model_validate_json(json.dumps(learned.ppo(steps=30, data={"ppo_epochs": 1}))), reward="rm"
    )
    memory = []
    for _ in range(6):
        for _ in range(2): trainer.step()
        mx.eval(trainer.trained.parameters(), trainer.optimizer.state)
        memory.append(mx.get_active_memory())
    size = sum(w.nbytes for _, w in tree_flatten(trainer.model.parameters()))
    assert memory[-1] - memory[1] < size
