"Supervised fine-tuning: which tokens are trained; planted bugs, each of which must be detected."
import json
import logging
import shutil
from pathlib import Path

import pytest

import mlx_pretrain  # noqa: F401, I001 (before MLX)

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map

from mlx_pretrain import chat, dataset, model as model_module
from mlx_pretrain import rows as row_files
from mlx_pretrain.cli import main
from mlx_pretrain.config import ConfigError, DataError
from mlx_pretrain.prompt import Example, Piece, PromptFormat
from mlx_pretrain.rows import SFTDataset
from mlx_pretrain.pretrain import PretrainConfig, pretrain
from mlx_pretrain.pretrained import PretrainedError, export, load
from mlx_pretrain.run import RunError, checkpoints, read_metadata, read_metrics
from mlx_pretrain.sft import SFTConfig, SFTTrainer, sft
from mlx_pretrain.step import Update
from mlx_pretrain.tokenizer import ByteTokenizer

ROWS = [{"instruction": f"Count {i}", "response": "one " * i + "</s><eos>"} for i in range(1, 11)]
MODEL = {"dimensions": {"hidden_size": 16, "intermediate_size": 32, "num_layers": 2}}


def write(name, rows):
    Path(name).write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def merged(a, b):
    return {**a, **{k: merged(a[k], v) if isinstance(v, dict) and isinstance(a.get(k), dict) else v
                    for k, v in b.items()}}


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("rows.jsonl", ROWS)
    write("val.jsonl", ROWS[:3])

    def make(**sections):
        values = {"name": "run", "data": {"input_file": "rows.jsonl", "validation_file": "val.jsonl",
                                          "preprocessing": {"max_context_size": 128}}, "model": MODEL,
                  "training": {"hyperparameters": {"batch_size": 4, "learning_rate": 1e-2}},
                  "logging": {"steps": {"validation_interval": 2, "checkpoint_interval": 2}}}
        return SFTConfig.model_validate_json(json.dumps(merged(values, sections)))
    return make


@pytest.fixture
def base(tmp_path, monkeypatch):
    "A pretrained run of one step."
    monkeypatch.chdir(tmp_path)
    write("text.jsonl", [{"text": "bottles of beer on the wall " * 20}])
    values = {"name": "base", "data": {"input_file": "text.jsonl", "preprocessing": {"max_context_size": 16}},
              "model": MODEL, "training": {"hyperparameters": {"batch_size": 2, "iters": 1}}}
    return pretrain(PretrainConfig.model_validate_json(json.dumps(values)))


# What is trained


def predictions(batches):
    "Every trained token with all tokens before it."
    for batch in batches:
        inputs, width = np.array(batch.inputs), batch.inputs.shape[1]
        mask = np.array(batch.loss_mask)
        positions, targets = (np.array(array)[mask].tolist() for array in (batch.positions, batch.targets))
        for position, target in zip(positions, targets):
            yield (*inputs[position // width, : position % width + 1].tolist(), target)


def expected(rows, context=128):
    "The same by hand: prompt bytes are read, response bytes and one end-of-text token are trained."
    for row in rows:
        ids = [257, *f"### Instruction:\n{row['instruction']}\n\n### Response:".encode()]
        if len(ids) + len(row["response"]) + 1 > context: continue
        for target in [*row["response"].encode(), 258]:
            ids.append(target)
            yield tuple(ids)


def trained(config, **data):
    trainer = SFTTrainer(config(data=data))
    steps = range(trainer.total_steps)
    return sorted(predictions(batch for step in steps for batch in trainer.batches_at(step)))


def test_only_the_response_and_its_eos_are_trained(config):
    assert trained(config) == sorted(expected(ROWS))


def change_pieces(monkeypatch, change):
    "Change the pieces of each row: beginning-of-text token, prompt, response, end-of-text token."
    original = row_files.row_pieces
    monkeypatch.setattr(row_files, "row_pieces", lambda *args: change(*original(*args)))


def loss_on_the_prompt(monkeypatch):
    change_pieces(monkeypatch, lambda bos, ask, say, eos: [bos, Piece(ask.content, True), say, eos])
def no_eos(monkeypatch): change_pieces(monkeypatch, lambda bos, ask, say, eos: [bos, ask, say])
def eos_only_read(monkeypatch):
    change_pieces(monkeypatch, lambda bos, ask, say, eos: [bos, ask, say, Piece(eos.content)])
def bos_twice(monkeypatch): change_pieces(monkeypatch, lambda bos, *rest: [bos, bos, *rest])
def bos_before_the_response(monkeypatch):
    change_pieces(monkeypatch, lambda bos, ask, say, eos: [bos, ask, bos, say, eos])


def response_one_late(monkeypatch):
    original = dataset.encode_pieces

    def encode(*args):
        return [Example(e.ids, [n > e.start for n in range(len(e.ids))]) for e in original(*args)]
    monkeypatch.setattr(dataset, "encode_pieces", encode)


def one_pad_token(monkeypatch):
    original = SFTDataset.batch

    def batch(self, indices):
        batch = original(self, indices)
        return batch._replace(loss_mask=mx.arange(batch.loss_mask.size) <= batch.loss_mask.sum())
    monkeypatch.setattr(SFTDataset, "batch", batch)


def text_becomes_eos(monkeypatch):
    original = ByteTokenizer._encode_batch

    def encode(self, texts):
        return [np.where(ids == 0, 258, ids.astype(int))
                for ids in original(self, [text.replace("<eos>", "\0") for text in texts])]
    monkeypatch.setattr(ByteTokenizer, "_encode_batch", encode)


def one_place_off(monkeypatch):
    original = SFTDataset.batch
    monkeypatch.setattr(SFTDataset, "batch",
                        lambda self, rows: (b := original(self, rows))._replace(positions=b.positions + 1))


BUGS = [loss_on_the_prompt, no_eos, eos_only_read, bos_twice, bos_before_the_response, response_one_late,
        one_pad_token, text_becomes_eos, one_place_off]


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_detected(config, monkeypatch, bug):
    bug(monkeypatch)
    assert trained(config) != sorted(expected(ROWS))


def truncated(row, context, truncation):
    "The bytes that are kept of a row, by hand: (prompt, response)."
    prompt = [257, *f"### Instruction:\n{row['instruction']}\n\n### Response:".encode()]
    response = [*row["response"].encode(), 258]
    n_cut = max(0, len(prompt) + len(response) - context)
    if truncation == "keep_start": return prompt, response[: len(response) - n_cut]
    return [257, *prompt[1 + n_cut:]], response


@pytest.mark.parametrize("truncation", ["keep_start", "keep_end"])
@pytest.mark.parametrize("planted", [False, True])
def test_the_right_end_is_truncated(config, monkeypatch, truncation, planted):
    if planted:
        original = row_files.truncate
        other = {"keep_start": "keep_end", "keep_end": "keep_start"}
        monkeypatch.setattr(row_files, "truncate",
                            lambda example, context, end, bos: original(example, context, other[end], bos))
    cfg = config(data={"truncation": truncation, "preprocessing": {"max_context_size": 64}})
    data = SFTTrainer(cfg).data
    right = [prompt + response for prompt, response in (truncated(row, 64, truncation) for row in ROWS)]
    assert ([data[i].ids for i in range(len(data))] == right) != planted
    lengths = [sum(map(len, truncated(row, 10**6, truncation))) for row in ROWS]
    assert data.source["truncated"] == sum(n > 64 for n in lengths) > 0


def test_dropped_rows_are_counted(config):
    source = SFTTrainer(config(data={"preprocessing": {"max_context_size": 64}})).data.source
    assert (source["rows"], source["kept"] + source["dropped"]) == (10, 10) and 0 < source["dropped"] < 10
    assert trained(config, preprocessing={"max_context_size": 64}) == sorted(expected(ROWS, 64))


def test_mask_prompt_false_trains_all_but_the_first_token(config):
    trainer = SFTTrainer(config(data={"mask_prompt": False}))
    assert trainer.data.n_targets == sum(len(trainer.data[i].ids) - 1 for i in range(10))


@pytest.mark.parametrize("batch_size, accumulate, epochs", [(4, 1, 1), (3, 2, 2), (16, 1, 2), (1, 3, 1)])
def test_each_row_once_per_epoch(config, batch_size, accumulate, epochs):
    hyper = {"batch_size": batch_size, "gradient_accumulation_steps": accumulate}
    trainer = SFTTrainer(config(training={"epochs": epochs, "hyperparameters": hyper}))
    per_epoch = trainer.total_steps // epochs
    for epoch in range(epochs):
        steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        predicted = predictions(batch for step in steps for batch in trainer.batches_at(step))
        assert sorted(predicted) == sorted(expected(ROWS))
    trainer.run()
    assert trainer.tokens == epochs * trainer.data.n_targets


def test_the_head_is_applied_at_trained_positions_only(config, monkeypatch):
    rows, original = [], model_module.head_loss
    monkeypatch.setattr(model_module, "head_loss", lambda hidden, *rest: rows.append(len(hidden))
                        or original(hidden, *rest))
    trainer = SFTTrainer(config())
    [batch] = trainer.batches_at(0)
    trainer.loss(trainer.model, batch)
    assert batch.loss_mask.sum().item() <= rows[-1] <= batch.loss_mask.sum().item() + 16 < batch.inputs.size


def test_a_batch_size_beyond_the_number_of_rows(config):
    trainer = SFTTrainer(config(training={"hyperparameters": {"batch_size": 4096}}))
    assert [b.inputs.shape[0] for b in (*trainer.batches_at(0), *trainer.held_out_batches())] == [10, 3]


@pytest.mark.parametrize("truncation, expected_ids", [("keep_end", [*b"e:", *b"two", 258]),
                                                      ("keep_start", [*b"Re:two"])])
def test_a_tokenizer_without_a_bos_token(tmp_path, truncation, expected_ids):
    tok = ByteTokenizer()
    tok.bos_id = None
    tok._control = dict
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "R", "response": "two"}\n')
    rows = row_files.read_examples(path, tok, PromptFormat(prompt_format="{instruction}e:"), 6, truncation)
    assert rows[0].ids == expected_ids
    assert rows[0].start == len(expected_ids) - (4 if truncation == "keep_end" else 3)


def test_plain_text_keeps_its_end_or_its_start(config):
    write("rows.jsonl", [{"text": "abcdefgh"}])
    for truncation, ids in (("keep_end", [257, *b"gh", 258]), ("keep_start", [257, *b"abc"])):
        data = SFTTrainer(config(data={"truncation": truncation, "preprocessing": {"max_context_size": 4},
                                       "validation_file": None})).data
        assert data[0].ids == ids and data.source["truncated"] == 1 and data.n_targets == 3


# Token-weighted loss


def mean_of_means(self, batches, rate, key=None):
    "Accumulate the gradients of mean losses: every batch has the same weight."
    sums = [self.gradient(batch) for batch in batches]
    means = [tree_map(lambda g, n=n: g / n, ((total, n), grads)) for (total, n), grads in sums]
    summed = means[0]
    for mean in means[1:]: summed = tree_map(mx.add, summed, mean)
    return self.apply(summed, mx.array(rate))


@pytest.mark.parametrize("planted", [False, True])
def test_accumulation_weighs_tokens(config, monkeypatch, planted):
    "Two batches of five rows with different numbers of tokens are the same step as one batch of ten."
    whole, halves = (SFTTrainer(config(training={"hyperparameters": {"batch_size": n}})) for n in (10, 5))
    whole.batches_at = lambda step: [whole.data.batch(np.arange(10))]
    halves.batches_at = lambda step: [halves.data.batch(rows) for rows in np.arange(10).reshape(2, 5)]
    if planted: monkeypatch.setattr(Update, "__call__", mean_of_means)
    halves.step()
    monkeypatch.undo()
    whole.step()
    one, two = (dict(tree_flatten(t.optimizer.state)) for t in (whole, halves))
    names = [name for name in one if name.endswith(".m")]                 # the gradients, a tenth of them
    apart = max(mx.abs(one[name] - two[name]).max().item() / mx.abs(one[name]).max().item() for name in names)
    assert (apart < 1e-4) != planted


def test_validation_weighs_tokens(config):
    trainer = SFTTrainer(config())
    sums = [[v.item() for v in trainer.loss(trainer.model, trainer.held_out.batch(np.array([i])))]
            for i in range(3)]
    (total, count) = np.array(sums).sum(axis=0)
    assert abs(trainer.evaluate()["val_loss"] / (total / count) - 1) < 1e-5


# Freezing and resuming


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd", "adam"])
def test_frozen_parameters_keep_their_bits(config, optimizer):
    trainer = SFTTrainer(config(training={"freeze": ["embed_tokens", 0, "*norm*"],
                                          "optimization": {"optimizer": optimizer}}))
    before = dict(tree_flatten(trainer.model.parameters()))
    for _ in range(3): trainer.step()
    after = dict(tree_flatten(trainer.model.parameters()))
    updated = {name for name in after if before[name].tolist() != after[name].tolist()}
    assert updated == {name for name in after if ".1." in name and "norm" not in name}
    states = {name[name.index("model."):].rpartition(".")[0]
              for name in trainer.arrays()["optimizer"] if "model." in name}
    assert states == updated


@pytest.mark.parametrize("system", [{"gradient_checkpointing": True}, {"precision": "bfloat16"}, {}])
def test_frozen_layers_with_checkpointing_and_bfloat16(config, system):
    training = {"freeze": ["embed_tokens", 0], "hyperparameters": {"gradient_accumulation_steps": 2}}
    trainer = SFTTrainer(config(system=system, training=training))
    before = dict(tree_flatten(trainer.model.parameters()))
    losses = [trainer.step()["loss"] for _ in range(2)]
    after = dict(tree_flatten(trainer.model.parameters()))
    frozen = {name for name in after if mx.array_equal(before[name], after[name])}
    assert frozen == {name for name in after if ".0." in name
                      or "embed" in name} and all(w.dtype == mx.float32 for w in after.values())
    assert all(np.isfinite(losses))


def test_resume_does_not_need_the_pretrained_model(config, base):
    def stop(trainer, metrics):
        if metrics["step"] == 3: trainer.stop_requested = True
    how = {"name": "tuned", "pretrained_model": "base", "data": {"prompt_format": "Q: {instruction}\nA:"}}
    with pytest.raises(KeyboardInterrupt): sft(config(**how, training={"epochs": 2}), callbacks=[stop])
    shutil.rmtree(base)
    path = sft(config(**how, training={"epochs": 2}, resume={"checkpoint": "latest"}))
    assert (
        read_metadata(path)["outcome"] == "finished" and load(path).format.format_question("x") == "Q: x\nA:"
    )
    branch = sft(config(**{**how, "name": "branch"}, training={"epochs": 3},
                        resume={"checkpoint": str(checkpoints(path)[-1])}))
    assert read_metadata(branch)["resumed_from"].startswith("runs/tuned")


def others(caplog):
    "The messages, without the warning about ROWS, whose responses spell a special token."
    return [record.message for record in caplog.records if "contains <eos> as text" not in record.message]


def test_changes_since_the_checkpoint_are_logged(config, caplog):
    sft(config(training={"epochs": 1}))
    assert "No pretrained_model" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        sft(config(training={"epochs": 2}, resume={"checkpoint": "latest"}))
    assert others(caplog) == ["resuming with another configuration: training.epochs: 1 → 2"]
    shorter = {"truncation": "keep_end", "preprocessing": {"max_context_size": 40}}
    for n, data in enumerate(({"mask_prompt": False}, {"prompt_format": "{instruction}:"}, shorter)):
        caplog.clear()
        again = config(name=f"again-{n}", data=data, training={"epochs": 3},
                       resume={"checkpoint": "runs/run"})
        with caplog.at_level(logging.WARNING): sft(again)
        assert "The training data or their chunking changed since the checkpoint." in caplog.text


def test_another_trainer_does_not_inherit_frozen_layers(config, base):
    opened = load(base)
    SFTTrainer(config(training={"freeze": [0, "embed_tokens"]}), opened)
    names = [name for name, _ in tree_flatten(SFTTrainer(config(), opened).model.trainable_parameters())]
    assert names == [name for name, _ in tree_flatten(opened.model.parameters())]


def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one(config):
    whole = sft(config(name="whole", training={"epochs": 3, "freeze": [0]}))

    def stop(trainer, metrics):
        if metrics["step"] == 5: trainer.stop_requested = True
    frozen = {"epochs": 3, "freeze": [0]}
    with pytest.raises(KeyboardInterrupt): sft(config(name="cut", training=frozen), callbacks=[stop])
    again = sft(config(name="cut", training=frozen, resume={"checkpoint": "latest"}))
    assert (again / "model" / "model.safetensors").read_bytes() == (
        whole / "model" / "model.safetensors"
    ).read_bytes()
    def rows(path):
        return [{k: v for k, v in row.items() if k != "tokens_per_second"}
                for row in read_metrics(path) if "event" not in row]
    assert rows(again) == rows(whole)


def test_best_checkpoint_is_kept_and_answers_are_logged(config):
    path = sft(config(training={"epochs": 4}))
    best = read_metadata(path)["best"]
    assert f"step_{best['step']:06d}" in [p.name for p in checkpoints(path)]
    assert best["val_loss"] == min(row["val_loss"] for row in read_metrics(path) if "val_loss" in row)
    log = (path / "logs" / "log.txt").read_text()
    assert log.count("Count 1") == log.count("Count 3") == 6 and "10 rows, 10 kept" in log


# Base model


def test_base_model_from_a_run_a_checkpoint_or_a_directory(config, base):
    sources = [base, checkpoints(base)[-1], base / "model", "base"]
    models = [SFTTrainer(config(pretrained_model=str(source))).model.parameters() for source in sources]
    for model in models:
        assert (
            dict(tree_flatten(model))["model.norm.weight"].tolist()
            == load(base).model.model.norm.weight.tolist()
        )
    for model in models[1:]:
        assert all(mx.array_equal(a, b)
                   for (_, a), (_, b) in zip(tree_flatten(model), tree_flatten(models[0]), strict=True))


def test_disagreement_with_the_base_model_is_one_warning(config, base, caplog):
    other = {"dimensions": {"hidden_size": 2048, "intermediate_size": 32}}
    with caplog.at_level(logging.WARNING): trainer = SFTTrainer(config(pretrained_model="base", model=other))
    said = ('"model.dimensions.hidden_size" is 2048, the pretrained model has 16. '
            "The pretrained model's values are used.")
    assert others(caplog) == [said]
    assert trainer.cfg.model.dimensions.hidden_size == 16
    caplog.clear()
    ByteTokenizer(300).save("other")
    with caplog.at_level(logging.WARNING):
        SFTTrainer(config(pretrained_model="base", data={"tokenizer_path": "other"}))
    assert len(others(caplog)) == 1 and "is not the tokenizer of the pretrained model" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        SFTTrainer(config(pretrained_model="base", data={"tokenizer_path": "runs/base/tokenizer"}))
    assert not others(caplog)


def test_the_format_is_inherited(config, base, caplog):
    first = sft(config(name="first", pretrained_model="base",
                       data={"prompt_format": "Q: {instruction}\nA:", "system_prompt": "Be brief."}))
    assert load(first).format == load(checkpoints(first)[-1]).format == load(first / "model").format
    assert load(first).format.format_question("x") == "Be brief.\n\nQ: x\nA:"
    with caplog.at_level(logging.INFO):
        second = sft(config(name="second", pretrained_model="first", data={"system_prompt": "Be kind."}))
    assert load(second).format.format_question("x") == "Be kind.\n\nQ: x\nA:"
    assert "Inherited from the pretrained model: data.prompt_format, data.response_format." in caplog.text
    assert "Q: {instruction}" in (second / "config.yaml").read_text()
    assert load(base).format is None
    # the chat template in model/ makes no tokens
    assert load(second).tokenizer.fingerprint == load(base).tokenizer.fingerprint


def test_plain_texts_teach_no_other_format(config, base, capsys):
    first = sft(config(name="first", pretrained_model="base", data={"prompt_format": "Q: {instruction}\nA:"}))
    write("rows.jsonl", [{"text": "abc"}] * 3)
    second = sft(config(name="second", pretrained_model="first", data={"validation_file": None}))
    assert load(second).format.format_question("x") == load(first).format.format_question("x") == "Q: x\nA:"
    Path("run.yaml").write_text('data: {input_file: rows.jsonl}')
    capsys.readouterr()
    assert main(["sft", "--config", "run.yaml", "--pretrained_model", "base"]) == 0
    assert "--prompt" in capsys.readouterr().out


def test_a_default_context_is_reduced_to_the_models(config):
    values = config(model={"attention": {"max_position_embeddings": 128}}).model_dump(
        exclude_unset=True, mode="json"
    )
    del values["data"]["preprocessing"]
    assert (
        SFTTrainer(SFTConfig.model_validate_json(json.dumps(values))).cfg.data.preprocessing.max_context_size
        == 128
    )


def test_a_foreign_chat_template_is_replaced(config, base):
    file = base / "model" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": "FOREIGN"}))
    opened = load(base / "model")
    assert opened.tokenizer.fingerprint == load(checkpoints(base)[-1]).tokenizer.fingerprint
    write("rows.jsonl", [{"instruction": "i", "response": "r", "topic": "t"}] * 2)
    for name, form, there in (("a", "Q: {instruction}", True), ("b", "{topic}: {instruction}", False)):
        cfg = config(name=name, data={"prompt_format": form, "validation_file": None})
        trainer = SFTTrainer(cfg, opened)
        export(trainer.model, trainer.tokenizer, name, trainer.format)
        assert (
            "FOREIGN" not in Path(name, "tokenizer_config.json").read_text()
            and Path(name, "chat_template.jinja").exists() == there
        )


def test_a_checkpoint_needs_its_run_directory(base, tmp_path):
    shutil.copytree(checkpoints(base)[-1], tmp_path / "away" / "step_000001")
    with pytest.raises(PretrainedError, match="needs its run directory around it"):
        load(tmp_path / "away" / "step_000001")


def test_a_run_cannot_replace_its_base_model(config, base):
    for resume in ({}, {"checkpoint": "latest"}):
        if resume: shutil.rmtree(base / "checkpoints")
        own = config(name="base", overwrite=True, pretrained_model="runs/base/model", resume=resume)
        with pytest.raises(ConfigError, match="would replace it"): sft(own)
    assert load(base).model


def test_resume_from_another_stage_is_refused(config, base):
    with pytest.raises(
        RunError, match='another stage .pretrain.; to start from its model, name it in "pretrained_model"'
    ):
        sft(config(resume={"checkpoint": str(base)}))


# Kinds of rows


@pytest.mark.parametrize("rows, data, prompt", [
    ([{"prompt": "Hi, ", "completion": "you."}], {}, "Hi, "),
    ([{"prompt": "Hi", "completion": "you."}], {"prompt_format": "<{instruction}>"}, "<Hi>"),
    ([{"q": "Hi", "a": "you."}],
     {"input_field": "q", "output_field": "a", "prompt_format": "{instruction}{q}"}, "HiHi"),
    ([{"instruction": "Hi", "input": "there", "output": "you."}],
     {"output_field": "output", "input_field_optional": "input", "prompt_format": "{instruction}"},
     "Hi\n\nthere"),
    ([{"instruction": "Hi", "response": "you.", "topic": "{x}"}],
     {"prompt_format": "{topic} {{}} {instruction}"}, "{x} {} Hi"),
    ([{"text": "you."}], {}, ""),
])
def test_kinds_of_rows(config, rows, data, prompt):
    write("rows.jsonl", rows)
    trainer = SFTTrainer(config(data={**data, "validation_file": None}))
    assert trainer.data[0].ids == [257, *prompt.encode(), *b"you.", 258]
    assert trainer.data[0].start == 1 + len(prompt)


def test_a_preprocess_function_makes_rows(config):
    Path("mine.py").write_text(
        "def make(row): return None if row['n'] == 1 else {'instruction': str(row['n']), 'response': 'x'}\n"
    )
    write("rows.jsonl", [{"n": n} for n in range(4)])
    source = SFTTrainer(config(data={"preprocess": "mine.py:make", "validation_file": None})).data.source
    assert (source["rows"], source["kept"], source["filtered"]) == (4, 3, 1)


# Errors


BAD = [
    ({"instruction": "?"}, 'there is no field "response"'),
    ({"instruction": 7, "response": "x"}, '"instruction" must be a string, found a number'),
    ({"instruction": "?", "response": None}, '"response" must be a string, found null'),
    ({"instruction": "?", "response": "\n"}, '"response" is empty'),
    ({"instruction": "long " * 40, "response": "x"}, "the prompt has 233 tokens, and"),
    ("{", "not valid JSON"),
    ('["a"]', "expected an object"),
]


@pytest.mark.parametrize("row, sentence", BAD)
def test_a_bad_row_is_an_error_or_counted(config, capsys, row, sentence):
    write("rows.jsonl", [*ROWS, row])
    Path("run.yaml").write_text(
        json.dumps({k: v for k, v in config().model_dump(mode="json", exclude_unset=True).items()})
    )
    assert main(["sft", "--config", "run.yaml"]) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith("mlx-pretrain: rows.jsonl, line 11: ")
        and sentence in error
        and error.count("\n") == 1
    )
    assert not Path("runs").exists()
    assert main(["sft", "--config", "run.yaml", "--data.on_bad_row", "skip"]) == 0
    kept = read_metadata("runs/run")["data"]["input_file"]
    assert (kept["rows"], kept["kept"],
            kept["skipped"]) == (11, 10, 1) and kept["trained_tokens"] == len(list(expected(ROWS)))


@pytest.mark.parametrize("data, sentence", [
    ({"prompt_format": "{topic}"}, 'rows.jsonl, line 1: there is no field "topic"'),
    ({"prompt_format": "{instruction.__class__}"}, "not the name of a field"),
    ({"prompt_format": "{system_prompt} {instruction}"}, 'set "data.system_prompt"'),
    ({"input_field": "q"}, 'rows.jsonl, line 1: "data.input_field" is "q", but the row has no such field'),
    ({"prompt_format": "{response}"}, "cannot hold {response}"),
    ({"preprocessing": {"max_context_size": 20}, "on_bad_row": "skip"},
     "none of its 10 rows can be used (10 bad, the first: rows.jsonl, line 1"),
    ({"input_file": "none.jsonl"}, '"data.input_file": none.jsonl does not exist'),
    ({"prompt_formt": "x"}, 'did you mean "data.prompt_format"?'),
])
def test_a_data_error_is_one_line(config, capsys, data, sentence):
    values = merged(config().model_dump(mode="json", exclude_unset=True), {"data": data})
    Path("run.yaml").write_text(json.dumps(values))
    assert main(["sft", "--config", "run.yaml"]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1 and not Path("runs").exists()


def test_columns_that_cannot_be_guessed(config):
    write("rows.jsonl", [{"q": "a", "a": "b"}])
    with pytest.raises(DataError, match='rows.jsonl, line 1: the row has "q", "a"; name the columns'):
        SFTTrainer(config())


@pytest.mark.parametrize("flag, sentence", [
    (["--training.freeze", "9"], "called 9; its layers are 0 to 1"),
    (["--training.freeze", "lm_head"], "called 'lm_head'"),
    (["--training.freeze", "0", "--training.train_only", "1"], "keep one of them"),
    (["--training.train_only", "1.5"], "training.train_only"),
    (["--pretrained_model", "nowhere"], "nowhere does not exist"),
    (["--data.truncation", "middle"], '"drop", "keep_start" or "keep_end"'),
])
def test_a_wrong_flag_is_one_line(config, capsys, flag, sentence):
    Path("run.yaml").write_text(json.dumps(config().model_dump(mode="json", exclude_unset=True)))
    assert main(["sft", "--config", "run.yaml", *flag]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


def test_an_unpaired_surrogate_is_reported_with_its_line(config):
    Path("mine.py").write_text(
        "def half(row): return {**row, 'response': 'x\\ud83d'} if row['instruction'] == 'Count 3' else row\n"
    )
    half = {"preprocess": "mine.py:half", "validation_file": None}
    with pytest.raises(DataError, match="rows.jsonl, line 3: a text holds half a character"):
        SFTTrainer(config(data=half))
    assert SFTTrainer(config(data={**half, "on_bad_row": "skip"})).data.source["skipped"] == 1


def test_the_first_row_may_be_bad_too(config):
    write("rows.jsonl", [{"note": "not a row"}, *ROWS])
    with pytest.raises(DataError, match='rows.jsonl, line 1: the row has "note"; name the columns'):
        SFTTrainer(config())
    assert SFTTrainer(config(data={"on_bad_row": "skip"})).data.source["skipped"] == 1


# Generation


@pytest.fixture
def tuned(config):
    rarely = {"validation_interval": 1000, "checkpoint_interval": 1000}
    return sft(config(name="tuned", training={"epochs": 100}, logging={"steps": rarely}))


def test_generate_and_chat_use_the_runs_own_format(tuned, base, capsys, monkeypatch):
    ask = ["generate", "--temperature", "0", "--max_new_tokens", "30", "--instruction", "Count 2", "--run"]
    assert main([*ask, "tuned"]) == 0
    assert capsys.readouterr().out == "one one </s><eos>\n"
    assert main([*ask, "base"]) == 2 and "was not fine-tuned" in capsys.readouterr().err
    assert main([*ask, "tuned", "--prompt", "x"]) == 2 and "keep one of them" in capsys.readouterr().err

    typed = iter(["Count 2", "x" * 3000, "Count 3", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    assert main(["chat", "--run", "tuned", "--temperature", "0", "--max_new_tokens", "30"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[1:] == ["one one </s><eos>",
                                    "one one one </s><eos>"] and "do not fit into this model's context" in err


def test_chat_history_holds_each_response_once(capsys, monkeypatch, config):
    "With a response format that adds text around a response, the next prompt has that text once."
    form = {"prompt_format": "<{instruction}>", "response_format": " A: {response}."}
    path = sft(config(name="framed", data=form, training={"epochs": 60},
                      logging={"steps": {"validation_interval": 1000}}))
    asked, original = [], chat.render_chat
    monkeypatch.setattr(chat, "render_chat", lambda *args: asked.append(original(*args)) or asked[-1])
    typed = iter(["Count 2", "Count 2", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    assert main(["chat", "--run", str(path), "--temperature", "0", "--max_new_tokens", "40", "--turns",
                 "3"]) == 0
    said = capsys.readouterr().out.splitlines()[-2]
    assert said.startswith("A: ") and asked[-1] == [257, *b"<Count 2>", *b" ", *said.encode(), 258,
                                                    *b"<Count 2>"]


def test_chat_refuses_a_format_that_needs_more_than_an_instruction(config, capsys):
    write("rows.jsonl", [{"instruction": "i", "response": "r", "topic": "t"}] * 2)
    sft(config(name="topics", data={"prompt_format": "{topic}: {instruction}", "validation_file": None}))
    assert main(["chat", "--run",
                 "topics"]) == 2 and "not from an instruction alone" in capsys.readouterr().err


def test_warning_if_validation_got_worse(config, caplog):
    write("val.jsonl", [{"instruction": "Count 1", "response": "QQQQ"}])
    path = sft(config(training={"epochs": 40}, logging={"steps": {"validation_interval": 30}}))
    best = read_metadata(path)["best"]["step"]
    kept = path / "checkpoints" / f"step_{best:06d}"
    assert (
        f"Validation was best at step {best} (" in caplog.text
        and f"use the checkpoint of that step, {kept}." in caplog.text
    )
    assert load(kept).format
