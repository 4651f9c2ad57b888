"Reward models: losses, pooling, prompt formats, training, normalization, saving; LoRA PPO; rules."
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mlx_pretrain import reward, reward_model
from mlx_pretrain.checkpoint import load_checkpoint
from mlx_pretrain.config import UserError
from mlx_pretrain.jsonl import Row
from mlx_pretrain.prompts import PromptDataset, read_prompts
from mlx_pretrain.lora import LoRAConfig, apply_lora
from mlx_pretrain.model import Linear, Llama, LlamaArgs, ScalarLlama
from mlx_pretrain.plot import plot_runs
from mlx_pretrain.ppo import PPOConfig, PPOTrainer, ppo
from mlx_pretrain.rollout import log_probs, make_forward, sample_responses
from mlx_pretrain.preferences import pad_right, read_preferences, encode_prompt_response, split_conversations
from mlx_pretrain.pretrained import Pretrained, export
from mlx_pretrain.prompt import PromptFormat, encode_pieces, pair_pieces
from mlx_pretrain.reward import (
    RewardEvaluation, RewardConfig, RewardTrainer, bradley_terry_loss, calibration, correlation,
    evaluate_reward, squared_error, train_reward)
from mlx_pretrain.reward_model import TrainedReward, last_score, load_reward, make_scorer
from mlx_pretrain.rules import Contains, Length, Matches, Sentiment, WeightedSum
from mlx_pretrain.run import checkpoints, read_metadata
from mlx_pretrain.score import RewardError, reward_name, score
from mlx_pretrain.tokenizer import ByteTokenizer, HFTokenizer
from mlx_pretrain.session import forecast
import mlx.core as mx
from common import tokenizer
from mlx.utils import tree_flatten
from toys import Letters, planted, task, tiny

PLAIN = PromptFormat(prompt_format="{instruction}", input_field="prompt", output_field="completion")
RNG = np.random.default_rng


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def small(tok=None, seed=0, **sizes):
    "A tiny model that is not trained."
    tok = tok or ByteTokenizer()
    args = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 2, "head_dim": 8, **sizes}
    return Pretrained(Llama(LlamaArgs(vocab_size=tok.vocab_size, **args), seed), tok, Path("small"))


def scalar(seed=0, loud=8, **more):
    "A model whose values differ at each token."
    model = ScalarLlama.from_llama(tiny(seed=seed, loud=loud, **more).model)
    model.score.weight = mx.random.normal(model.score.weight.shape, key=mx.random.key(seed))
    return model


def trainer_on(tmp_path, rows, held_out=None, pretrained=None, steps=40, lr=3e-3, batch=16, training=None,
               hyper=None, **data):
    "A `RewardTrainer` on these rows."
    data = {"input_file": write(tmp_path / "rows.jsonl", rows), "response_length": 8, **data}
    if held_out: data["validation_file"] = write(tmp_path / "held_out.jsonl", held_out)
    hyper = {"batch_size": batch, "learning_rate": lr, "iters": steps, **(hyper or {})}
    cfg = {"data": data, "training": {"hyperparameters": hyper, **(training or {})}}
    return RewardTrainer(RewardConfig.model_validate_json(json.dumps(cfg)), pretrained or tiny())


def count_a(prompt, response): return response.count("a") / 8


def pairs(n, seed=0, swap=False):
    "Pairs by a known rule: more `a` is better."
    rng, rows = RNG(seed), []
    while len(rows) < n:
        texts = ["".join(rng.choice(list("abcdefgh"), rng.integers(1, 9))) for _ in range(2)]
        if texts[0].count("a") == texts[1].count("a"): continue
        better, worse = sorted(texts, key=lambda text: -text.count("a"))
        rows.append({"prompt": "", "chosen": worse if swap else better,
                     "rejected": better if swap else worse})
    return rows


def fails(check, *args):
    "Whether a check fails."
    try: check(*args)
    except AssertionError: return True
    return False


# ---- the losses

def by_formula(chosen, rejected, margin, penalty):
    "−log σ(chosen − rejected − margin) + penalty · (chosen + rejected)², summed, with gradients, in float64."
    wrong = 1 - 1 / (1 + np.exp(-(chosen - rejected - margin)))           # probability of the other order
    centering = 2 * penalty * (chosen + rejected)
    loss = (-np.log(1 - wrong) + penalty * (chosen + rejected) ** 2).sum()
    return loss, -wrong + centering, wrong + centering


def check_bradley_terry(loss):
    rng = RNG(0)
    for penalty in (0.0, 0.01, 0.7):
        chosen, rejected, margin = rng.normal(0, 2, 50), rng.normal(0, 2, 50), rng.normal(0, 1, 50)
        arrays = [mx.array(x, mx.float32) for x in (chosen, rejected, margin)]
        (total, count, _), gradients = mx.value_and_grad(lambda c, r, m, p=penalty: loss(c, r, m, p),
                                                         argnums=(0, 1))(*arrays)
        wanted, *wanted_gradients = by_formula(chosen, rejected, margin, penalty)
        assert abs(total.item() - wanted) < 1e-5 * abs(wanted) and count.item() == 50
        assert all(np.abs(np.array(g) - w).max() < 1e-5
                   for g, w in zip(gradients, wanted_gradients, strict=True))


def test_bradley_terry_loss_matches_formula():
    "Loss, and gradient to both responses, with margin and centering."
    check_bradley_terry(bradley_terry_loss)


@pytest.mark.parametrize(("right", "wrong"), {
    "swapped": ("chosen - rejected", "rejected - chosen"),
    "margin with a wrong sign": ("margin - difference", "-margin - difference"),
    "centering of the difference": ("chosen + rejected)", "chosen - rejected)"),
    "no centering": ("center_rewards_coefficient * mx", "0 * mx"),
    "a mean": ("loss.sum()", "loss.mean()")}.values())
def test_wrong_bradley_terry_losses_are_detected(right, wrong):
    "Negative controls."
    assert fails(check_bradley_terry, planted(bradley_terry_loss, right, wrong))


def test_bradley_terry_loss_is_stable_far_from_zero():
    "No overflow, and a gradient of 1 where the model is confident and wrong. Red with log(1 + exp(x))."
    loss, grad = mx.value_and_grad(lambda c: bradley_terry_loss(c, mx.array([0.0]), 1e5)[0])(mx.array([-1e4]))
    assert abs(loss.item() - 1.1e5) < 1 and grad.item() == -1


def test_accuracy_counts_a_tie_as_half():
    "Red if a model with constant scores has an accuracy of 0 or 1."
    assert bradley_terry_loss(mx.array([1.0, 2.0, 3.0, 0.0]),
                              mx.array([0.0, 2.0, 4.0, 0.0]))[2]["accuracy"].item() == 2.0


def check_squared_error(loss):
    rng = RNG(1)
    scores, rewards = rng.normal(size=20), rng.normal(size=20)
    (total, count, metrics), grad = mx.value_and_grad(loss)(mx.array(scores, mx.float32),
                                                            mx.array(rewards, mx.float32))
    assert abs(total.item() - 0.5 * ((scores - rewards) ** 2).sum()) < 1e-5 and count.item() == 20
    assert np.abs(np.array(grad) - (scores - rewards)).max() < 1e-6
    assert abs(metrics["error"].item() - np.abs(scores - rewards).sum()) < 1e-4


def test_squared_error_matches_formula():
    "Negative controls: twice as much, the other sign, no square."
    check_squared_error(squared_error)
    for right, wrong in (("0.5 * mx", "mx"), ("0.5", "-0.5"), ("mx.square", "mx.abs")):
        if "mx.square" in right: right, wrong = "mx.square(scores - rewards)", "(mx.abs(scores - rewards))"
        assert fails(check_squared_error, planted(squared_error, right, wrong))


def check_loss_of_a_batch(trainer, rows):
    "A batch of three pairs: margins belong to their own pairs, the chosen response comes first."
    trainer.model.update(scalar().parameters())
    total, count, metrics = trainer.batch_loss(trainer.model, trainer.data.batch(np.array([2, 0, 1])))
    def value(text):
        return trainer.model.values(mx.array([[1, *trainer.tokenizer.encode(text), 2]]))[0, -1].item()
    wanted = sum(by_formula(value(row["chosen"]), value(row["rejected"]), row["margin"], 0.01)[0]
                 for row in rows)
    assert abs(total.item() - wanted) < 1e-3 * wanted and count.item() == 3
    tokens = sum(len(row[key]) + 2 for row in rows for key in ("chosen", "rejected"))
    assert metrics["tokens"].item() == tokens


ROWS = [{"prompt": "", "chosen": "abc", "rejected": "h", "margin": 0.5},
        {"prompt": "", "chosen": "b", "rejected": "aaaa", "margin": 3.0},
        {"prompt": "", "chosen": "cccccc", "rejected": "dd", "margin": -1.0}]


def test_batch_loss_is_the_sum_over_its_pairs(tmp_path, monkeypatch):
    "From the file to the sum. Red if responses are swapped, or margins belong to other pairs."
    check_loss_of_a_batch(trainer_on(tmp_path, ROWS), ROWS)
    swapped = planted(reward.make_preference_loss, "*mx.split(scores, 2)", "*mx.split(scores, 2)[::-1]")
    mixed = planted(reward.make_preference_loss, "values, center", "values[::-1], center")
    for wrong in (swapped, mixed):
        monkeypatch.setattr(reward, "make_preference_loss", wrong)
        assert fails(check_loss_of_a_batch, trainer_on(tmp_path, ROWS), ROWS)


def test_gradient_accumulation_equals_a_large_batch(tmp_path):
    "Five pairs at once, or two and two and one. Red if a mean of means is taken."
    rows, trainers = pairs(5), []
    for size, accumulation in ((5, 1), (2, 3)):
        hyper = {"gradient_accumulation_steps": accumulation}
        trainers.append(trainer_on(tmp_path, rows, batch=size, hyper=hyper, steps=2))
        assert trainers[-1].sampler.epoch_steps == 1
        for _ in range(2): metrics = trainers[-1].step()
    assert metrics["tokens"] == 2 * sum(len(row[key]) + 2 for row in rows for key in ("chosen", "rejected"))
    for (_, a), (_, b) in zip(*(tree_flatten(t.model.parameters()) for t in trainers), strict=True):
        assert mx.abs(a - b).max() < 2e-4


# ---- pooling

TEXTS = [[1, 5, 4, 2], [1, 2], [1, 3, 3, 7, 8, 9, 10, 4, 2], [1, 9, 0, 9, 2],
         [1, *[3 + n % 8 for n in range(20)], 2]]


def check_pooling(pool):
    "In a batch and alone: score, and gradient of all weights."
    model, weights = scalar(), RNG(2).normal(size=len(TEXTS))
    def run(tokens, mask, weight):
        def total(parameters):
            model.update(parameters)
            scores = pool(model, mx.array(tokens), mx.array(mask))
            return (scores * mx.array(weight, mx.float32)).sum(), scores
        (_, scores), grads = mx.value_and_grad(total)(model.trainable_parameters())
        return np.array(scores), {name: np.array(g) for name, g in tree_flatten(grads)}
    alone = [run([text], [[True] * len(text)], [weight]) for text, weight in zip(TEXTS, weights)]
    model.update(scalar().parameters())
    for text, ((score_alone,), _) in zip(TEXTS, alone):
        assert abs(score_alone - model.values(mx.array([text]))[0, -1].item()) < 1e-4
    for extra, seed in ((0, 0), (9, 1)):
        tokens, mask = pad_right(TEXTS, 0)
        tokens, mask = np.pad(tokens, ((0, 0), (0, extra))), np.pad(mask, ((0, 0), (0, extra)))
        if seed: tokens = np.where(mask, tokens, RNG(seed).integers(0, 11, tokens.shape)).astype(np.int32)
        scores, grads = run(tokens, mask, weights)
        assert np.abs(scores - [one[0] for one, _ in alone]).max() < 1e-4
        for name, grad in grads.items():
            wanted = sum(one[name] for _, one in alone)
            assert np.abs(grad - wanted).max() <= 1e-4 * max(1, np.abs(wanted).max()), name


def test_padding_does_not_affect_scores_or_gradients():
    "Whatever tokens the padding has, and however wide it is."
    check_pooling(last_score)


@pytest.mark.parametrize("wrong", {
    "last column": "mx.full((len(tokens), 1), tokens.shape[1] - 1)",
    "one too early": "mask.sum(axis=1, keepdims=True) - 2",
    "mask ignored": "(tokens != 0).sum(axis=1, keepdims=True) - 1",
    "one too late": "mx.minimum(mask.sum(axis=1, keepdims=True), tokens.shape[1] - 1)"}.values())
def test_wrong_pooling_positions_are_detected(wrong):
    "Negative controls."
    assert fails(check_pooling, planted(last_score, "mask.sum(axis=1, keepdims=True) - 1", wrong))


def check_order(maker):
    model, texts = scalar(), [TEXTS[i] for i in (4, 1, 0, 2, 3, 1, 4)]
    alone = [last_score(model, mx.array([text]), mx.ones((1, len(text)), dtype=mx.bool_)).item()
             for text in texts]
    assert np.abs(maker(model, 0, 2)(texts) - alone).max() < 1e-4


def test_scorer_keeps_the_order_and_uses_current_weights():
    "Texts are sorted by length internally. Red if scores are out of order, or those of earlier weights."
    check_order(make_scorer)
    assert fails(check_order, planted(make_scorer, "result[batch] =", "result[np.sort(batch)] ="))
    model = scalar()
    scores = make_scorer(model, 0)
    before = scores(TEXTS)
    model.update(scalar(1).parameters())
    assert (
        np.abs(scores(TEXTS) - make_scorer(model, 0)(TEXTS)).max() == 0
        and np.abs(scores(TEXTS) - before).max() > 1e-3
    )
    assert scores([]).shape == (0,)


# ---- prompt formats

def message(role, content): return {"role": role, "content": content}


AROUND = PromptFormat(prompt_format="{system_prompt}\nQ: {instruction}\nA:",
                      response_format=" <<{response}>>\n", system_prompt="Be  kind. ", input_field="prompt",
                      output_field="completion")
EXCHANGES = [("the boats", "count  them", " every morning "), ("é 🙂<eos>", "<pad>\n", "e\u0301▁"),
             (" ", "", "\n\n"), ("a\u2028", "no\0thing", "<<x>>")]


def in_training_and_ppo(tmp_path, tok, fmt, rows, asked):
    "Token ids of the chosen responses: in reward training, and in PPO when the policy gives these responses."
    trained = read_preferences(write(tmp_path / "pairs.jsonl", rows), tok, fmt, 500)
    dataset = read_prompts(write(tmp_path / "asked.jsonl", asked), tok, fmt, 500, 100)
    prompts = dataset.prompts
    assert prompts == trained.prompts
    responses = []
    for row, prompt in zip(rows, prompts):
        better = row["chosen"] if isinstance(row["chosen"], str) else row["chosen"][-1]["content"]
        example = encode_pieces(tok, [pair_pieces(tok, tok.decode(prompt), fmt.format_response(better))])[0]
        responses.append(example.ids[example.start:])
    judge, scored = TrainedReward(scalar(), tok, fmt), []
    judge.scores = lambda texts: (scored.extend(texts), np.zeros(len(texts), np.float32))[1]
    sample_responses(Pretrained(None, tok, Path(), fmt), replace(dataset, responses=responses),
                     np.arange(len(prompts)), judge)
    return trained.chosen, scored


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "huggingface"])
@pytest.mark.parametrize(
    "fmt",
    [AROUND, PLAIN, PLAIN.model_copy(update={"response_format": "{response}", "system_prompt": "Hm."})],
    ids=["text around", "plain", "system prompt"])
def test_training_and_ppo_score_the_same_tokens(kind, fmt, tmp_path, monkeypatch):
    "With text and spaces around the response. Red if the format is applied in only one of the two."
    rows = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in EXCHANGES]
    asked = [{"prompt": p} for p, _, _ in EXCHANGES]
    trained, used = in_training_and_ppo(tmp_path, tokenizer(kind), fmt, rows, asked)
    assert trained == used and all(ids[-1] == tokenizer(kind).eos_id for ids in used)
    if fmt is not AROUND: return
    monkeypatch.setattr(reward_model, "encode_prompt_response",
                        planted(encode_prompt_response, "fmt.format_response(response)", "response"))
    trained, used = in_training_and_ppo(tmp_path, tokenizer(kind), fmt, rows, asked)
    assert all(a != b for a, b in zip(trained, used, strict=True))


CHATML = ("{% for m in messages %}{{ '<bos>' + m['role'] + '\n' + m['content'] + '<eos>\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<bos>assistant\n' }}{% endif %}")


def chat_tokenizer(folder, template=CHATML):
    "A byte tokenizer with a chat template."
    ByteTokenizer().save(folder)
    (folder / "chat_template.jinja").write_text(template)
    return HFTokenizer(folder)


def spelt(tok, ids): return "".join(map(tok.piece, ids))


def test_chat_template_is_applied_in_training_and_ppo(tmp_path):
    "Each turn with its special tokens, the response with the end of its turn. Red if only text is encoded."
    tok = chat_tokenizer(tmp_path / "tok")
    fmt = PromptFormat(prompt_format=None, input_field="prompt", output_field="completion")
    talk = [message("system", "Be brief."), message("user", "q"), message("assistant", "early"),
            message("user", "p <eos>")]
    rows = [{"prompt": talk, "chosen": [message("assistant", "yes ")],
             "rejected": [message("assistant", "no")]},
            {"prompt": "q", "chosen": "", "rejected": "no"}]
    trained, used = in_training_and_ppo(tmp_path, tok, fmt, rows, [{"prompt": talk}, {"prompt": "q"}])
    assert trained == used and spelt(tok, used[1]) == "<bos>user\nq<eos>\n<bos>assistant\n<eos>\n"
    assert spelt(tok, used[0]) == (
        "<bos>system\nBe brief.<eos>\n<bos>user\nq<eos>\n<bos>assistant\nearly<eos>\n"
        "<bos>user\np <eos><eos>\n<bos>assistant\nyes <eos>\n"
    )
    assert [*used[0]].count(tok.eos_id) == 5  # what a user writes is no special token
    texts = [tok.decode(ids) for ids in read_preferences(tmp_path / "pairs.jsonl", tok, fmt, 500).prompts]
    assert (
        encode_prompt_response(tok, fmt, texts, ["yes ", ""])[1]
        == used[1]
        != encode_prompt_response(tok, fmt, ["another text"], [""])[0]
    )
    assert encode_prompt_response(tok, fmt, ["another text"], [""]) == encode_prompt_response(
        tok, fmt, [""], [""], [[message("user", "another text")]]
    )


def test_reward_model_reads_prompts_in_its_own_format(tmp_path):
    "Its format differs from that of the policy. Red if it reads the policy's text."
    tok, chat = ByteTokenizer(), chat_tokenizer(tmp_path / "tok")
    asked = read_prompts(write(tmp_path / "r.jsonl", [{"prompt": "Who?"}]), tok, AROUND, 500, 10)
    text, messages = [tok.decode(asked.prompts[0])], asked.columns([0])["prompt_messages"]
    assert spelt(
        chat, encode_prompt_response(chat, PromptFormat(prompt_format=None), text, ["I."], messages)[0]
    ) == ("<bos>system\nBe  kind. <eos>\n<bos>user\nWho?<eos>\n<bos>assistant\nI.<eos>\n")
    plain = PLAIN.model_copy(update={"prompt_format": "<{instruction}>"})
    assert spelt(tok, encode_prompt_response(tok, plain, text, ["I."],
                                             messages)[0]) == "<bos>Be  kind. \n\n<Who?>I.<eos>"
    assert spelt(tok, encode_prompt_response(tok, PromptFormat(prompt_format="{prompt}"), ["as it is"],
                                             ["I."], messages)[0]) == "<bos>as it isI.<eos>"


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_conversations_are_encoded_as_in_ppo(kind, tmp_path):
    "Complete conversations, only answers, or answers to a text; earlier turns belong to the prompt."
    talk = [message("system", "Be brief."), message("user", "q"), message("assistant", "early"),
            message("user", "p <eos>")]
    answers = [message("assistant", "yes "), message("assistant", " no")]
    forms = [{"chosen": [*talk, answers[0]], "rejected": [*talk, answers[1]]},
             {"prompt": talk, "chosen": answers[:1], "rejected": answers[1:]},
             {"prompt": talk[1:2], "chosen": [talk[1], answers[0]], "rejected": [talk[1], answers[1]]},
             {"prompt": "q", "chosen": [talk[1], answers[0]], "rejected": [talk[1], answers[1]]}]
    asked = [{"prompt": talk}, {"prompt": talk}, {"prompt": talk[1:2]}, {"prompt": talk[1:2]}]
    fmt = AROUND.model_copy(update={"prompt_format": "[{instruction}]"})
    trained, used = in_training_and_ppo(tmp_path, tokenizer(kind), fmt, forms, asked)
    assert trained == used and trained[0] == trained[1] and trained[2] == trained[3]
    assert "early" in tokenizer(kind).decode(trained[0]) and "yes" in tokenizer(kind).decode(trained[0])


def test_long_texts_are_truncated_on_the_left():
    "Texts beyond the context keep BOS and their end. Red if the response is cut."
    tok, scored = Letters("abcdefgh"), []
    model = scalar()
    model.args = model.args.model_copy(update={"max_position_embeddings": 6})
    judge = TrainedReward(model, tok, PLAIN)
    judge.scores = lambda texts: (scored.extend(texts), np.zeros(len(texts), np.float32))[1]
    judge.compute_reward(["aaaaaaaab", "a"], ["cd", "cdd"])
    assert [tok.decode(ids) for ids in scored] == ["abcd", "acdd"]
    assert all(ids[0] == 1 and ids[-1] == 2 and len(ids) == 6 for ids in scored)


def test_split_conversations_leaves_texts_alone():
    row = Row("f", 1, {"prompt": "a", "chosen": "b", "rejected": "c"})
    assert split_conversations(row) is row


def test_response_format_with_another_column_is_used_or_rejected(tmp_path):
    "The reward model of a policy that writes `q: answer` must be trained on that, or such a format rejected."
    rows = [{"prompt": "q", "chosen": "yes", "rejected": "no"}]
    try: trainer = trainer_on(tmp_path, rows, pretrained=small(), response_format="{instruction}: {response}")
    except UserError: return
    assert "q: yes" in trainer.tokenizer.decode(trainer.data.chosen[0])


def test_response_lengths_do_not_include_the_prompt(tmp_path):
    "With a chat template the prompt has special tokens that its text lacks. Red if two encodings are mixed."
    folder = tmp_path / "tok"
    ByteTokenizer().save(folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<bos>{{ m.role }}:{{ m.content }}"
        "{% if m.role == 'assistant' %}<eos>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<bos>assistant:{% endif %}")
    rows = [{"prompt": "hm", "chosen": "abcd", "rejected": "ab"}]
    begin = small(HFTokenizer(folder))._replace(format=PromptFormat(prompt_format=None))
    trainer = trainer_on(tmp_path, rows, rows, begin, steps=1)
    assert evaluate_reward(trainer.normalized(), trainer.held_out).lengths.tolist() == [[5, 3]]


# ---- learning a known rule, and PPO against it

def test_known_rule_is_learned_and_raised_by_ppo(tmp_path):
    "Accuracy of at least 90%, at most 10% with swapped pairs; and the policy writes more `a`."
    held_out = pairs(200, seed=1)
    right, wrong = (trainer_on(tmp_path, pairs(200, swap=swap), held_out, steps=30, batch=32, lr=5e-3)
                    for swap in (False, True))
    for trainer in (right, wrong): metrics = trainer.run()
    assert (
        right.evaluate()["val_accuracy"] >= 0.9
        and metrics["val_accuracy"] == wrong.evaluate()["val_accuracy"] <= 0.1
    )
    learned = right.normalized()
    trainer = task(learned, steps=12, batch=32, lr=1e-2, response_length=6, kl_coef=0.05)
    def gold_reward():
        samples = trainer.sample(trainer.data, np.zeros(256, int), {"temperature": 1.0}, -7)
        return np.mean([count_a("", response) for response in samples.response_texts])
    before = gold_reward()
    trainer.run()
    assert gold_reward() > before + 0.15


def test_rewards_of_rows_are_learned(tmp_path):
    "Single responses: a correlation of at least 0.9 with the rewards of held-out rows."
    def rows(seed):
        return [{"prompt": "", "completion": row["chosen"], "reward": count_a("", row["chosen"])}
                for row in pairs(200, seed)]
    trainer = trainer_on(tmp_path, rows(0), rows(1), steps=60, batch=32, lr=1e-2)
    assert trainer.run()["val_correlation"] > 0.9


# ---- normalization

def test_reward_is_normalized_on_samples_of_the_initial_policy(tmp_path):
    "Mean 0 and standard deviation 1 on fresh samples. Red if it is normalized on the rows, or not at all."
    trainer = trainer_on(tmp_path, pairs(200), steps=40, normalization_samples=512)
    trainer.run()
    normalized = trainer.normalized()
    fresh = task(normalized, prompts=("",) * 8, response_length=8).sample
    scores = fresh(PromptDataset([[1]], None, None, 8), np.zeros(1024, int), {"temperature": 1.0}, -9).scores
    assert abs(scores.mean()) < 0.15 and abs(scores.std() - 1) < 0.15
    plain = TrainedReward(trainer.model, trainer.tokenizer, trainer.format)
    rows = plain.scores(trainer.data.texts)
    shift, spread = rows.mean() - normalized.mean, rows.std() / normalized.std
    assert abs(shift) > 0.2 * normalized.std or abs(spread - 1) > 0.1


def test_normalization_uses_prompts_from_the_complete_file(tmp_path, monkeypatch):
    "Files are often sorted. Red if only the first prompts are used."
    used, work = [], reward.generate_text

    def recorded(model, tok, prompts, *args, **kwargs):
        used.extend(map(tuple, prompts))
        return work(model, tok, prompts, *args, **kwargs)
    monkeypatch.setattr(reward, "generate_text", recorded)
    letters = "abcdefgh"
    rows = [{"prompt": a + b, "chosen": "a", "rejected": "b"} for a in letters for b in letters]
    trainer = trainer_on(tmp_path, rows, normalization_samples=16)
    trainer.normalized()
    assert len(used) == 16 and {letters[ids[1] - 3] for ids in used} > {"a", "b", "c", "d"}


def test_constant_reward_is_only_shifted(tmp_path, caplog):
    "The head starts at zero. Red if it divides by zero, or takes rounding errors for a standard deviation."
    trainer = trainer_on(tmp_path, pairs(8))
    normalized = trainer.normalized()
    assert (normalized.mean, normalized.std) == (0.0, 1.0) and "the same reward" in caplog.text
    assert normalized.compute_reward(["", ""], ["a", ""]).tolist() == [0.0, 0.0]
    assert normalized.compute_reward([], []).shape == (0,)
    trainer = trainer_on(tmp_path, pairs(8), normalization_samples=1)     # one sample has no spread either
    trainer.model.update(scalar().parameters())
    assert trainer.normalized().std == 1.0


def test_saved_and_loaded_reward_is_bit_identical(tmp_path):
    "With format, tokenizer, mean and standard deviation; exported logits are not normalized."
    tok, model = ByteTokenizer(), ScalarLlama.from_llama(small().model)
    model.score.weight = mx.random.normal(model.score.weight.shape, key=mx.random.key(3))
    judge = TrainedReward(model, tok, AROUND, 0.1, 1 / 3)
    judge.save(tmp_path / "model")
    again, asked = load_reward(tmp_path / "model"), (["a", "bc"], ["", "xyz 🙂"])
    assert (
        again.compute_reward(*asked).tolist() == judge.compute_reward(*asked).tolist()
        and again.format == AROUND
    )
    assert (again.mean, again.std) == (0.1, 1 / 3)
    plain = TrainedReward(again.model, again.tokenizer, again.format).compute_reward(*asked)
    assert np.abs((plain - 0.1) * 3 - judge.compute_reward(*asked)).max() < 1e-5 and np.ptp(plain) > 0
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"] and config["num_labels"] == 1


def test_exported_pad_token_differs_from_eos(tmp_path):
    "Many published tokenizers pad with EOS; transformers would take the last token, an EOS, for padding."
    ByteTokenizer().save(folder := tmp_path / "tok")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tok = HFTokenizer(folder)
    assert tok.pad_id == tok.eos_id
    TrainedReward(ScalarLlama.from_llama(small(tok).model), tok, PLAIN).save(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["pad_token_id"] != config["eos_token_id"]


# ---- runs

class Killed(BaseException): pass


def reward_cfg(home, name, rows=None, steps=6, every=2, resume=False, **more):
    if not (home / "base").exists(): export(small().model, ByteTokenizer(), home / "base")
    rows, held_out = (write(home / file, rows or pairs(20, seed))
                      for file, seed in (("r.jsonl", 0), ("h.jsonl", 1)))
    cfg = {"name": name, "pretrained_model": str(home / "base"),
           "resume": {"checkpoint": "latest" if resume else None},
           "data": {"input_file": rows, "validation_file": held_out, "response_length": 4,
                    "normalization_samples": 16},
           "training": {"hyperparameters": {"batch_size": 4, "iters": steps, "learning_rate": 1e-2,
                                            **more.pop("hyper", {})}},
           "logging": {"keep_last": 50, "steps": {"checkpoint_interval": every, "validation_interval": 3,
                                                  "logging_interval": 1}}, **more}
    return RewardConfig.model_validate_json(json.dumps(cfg))


def check_same_end(calm, cut):
    "The same arrays and state in the last checkpoint, and the same files of the model."
    (a, state_a), (b, state_b) = (load_checkpoint(checkpoints(run)[-1]) for run in (calm, cut))
    assert [name for name, _ in tree_flatten(a)] == [name for name, _ in tree_flatten(b)]
    assert all(mx.array_equal(x, y)
               for (_, x), (_, y) in zip(tree_flatten(a), tree_flatten(b), strict=True))
    assert state_a == state_b
    for file in (calm / "model").iterdir():
        assert file.read_bytes() == (cut / "model" / file.name).read_bytes(), file.name


def stop_after(step):
    def stop(trainer, metrics):
        if metrics["step"] == step: raise Killed
    return stop


def test_killed_and_resumed_reward_training_is_bit_identical(tmp_path):
    "Weights, optimizer, state, mean and standard deviation. Red if batches are counted from zero."
    calm = train_reward(reward_cfg(tmp_path, "calm"), tmp_path / "runs")
    with pytest.raises(Killed):
        train_reward(reward_cfg(tmp_path, "cut"), tmp_path / "runs", callbacks=[stop_after(5)])
    assert checkpoints(tmp_path / "runs" / "cut")[-1].name == "step_000004"
    check_same_end(calm, train_reward(reward_cfg(tmp_path, "cut", resume=True), tmp_path / "runs"))
    metrics = [read_metadata(tmp_path / "runs" / name)["reward_model"] for name in ("calm", "cut")]
    expected = {"mean", "std", "accuracy", "calibration_error", "length_correlation"}
    assert metrics[0] == metrics[1] and expected <= metrics[0].keys()
    other = train_reward(reward_cfg(tmp_path, "other", hyper={"learning_rate": 9e-3}), tmp_path / "runs")
    assert fails(check_same_end, calm, other)


def test_killed_before_the_model_is_written(tmp_path, monkeypatch):
    "After the last step, during normalization: resuming writes the model."
    calm = train_reward(reward_cfg(tmp_path, "calm"), tmp_path / "runs")
    with monkeypatch.context() as patch:
        patch.setattr(RewardTrainer, "normalized", lambda self: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed): train_reward(reward_cfg(tmp_path, "cut"), tmp_path / "runs")
    assert not (tmp_path / "runs" / "cut" / "model").exists()
    check_same_end(calm, train_reward(reward_cfg(tmp_path, "cut", resume=True), tmp_path / "runs"))


def test_best_weights_are_exported(tmp_path, monkeypatch):
    "By the loss on held-out pairs. Red if the last weights are written, or those with the highest loss."
    measured = iter([0.5, 0.2, 0.9])
    monkeypatch.setattr(RewardTrainer, "evaluate",
                        lambda self: {"val_loss": next(measured), "val_accuracy": 0.5})
    run = train_reward(reward_cfg(tmp_path, "run", steps=9), tmp_path / "runs")
    assert read_metadata(run)["best"] == {"step": 6, "val_loss": 0.2}
    weights = load_checkpoint(next(path
                                   for path in checkpoints(run) if path.name == "step_000006"))[0]["model"]
    last = load_checkpoint(checkpoints(run)[-1])[0]["model"]
    written = dict(tree_flatten(load_reward(run).model.parameters()))
    assert all(mx.array_equal(written[name], weights[name]) for name in weights)
    assert not all(mx.array_equal(written[name], last[name]) for name in weights)


def test_reported_accuracy_is_that_of_the_loaded_model(tmp_path, monkeypatch):
    "Opened by name, and called as PPO calls it."
    monkeypatch.chdir(tmp_path)
    run = train_reward(reward_cfg(tmp_path, "mine", steps=12), "runs")
    opened, rows = load_reward("mine"), pairs(20, 1)
    better, worse = (opened.compute_reward([row["prompt"] for row in rows], [row[key] for row in rows])
                     for key in ("chosen", "rejected"))
    evaluation = json.loads((run / "held_out.json").read_text())
    assert np.abs(np.array(evaluation["scores"]) - np.stack([better, worse], axis=1)).max() < 1e-5
    assert read_metadata(run)["reward_model"]["accuracy"] == pytest.approx(
        ((better > worse) + 0.5 * (better == worse)).mean()
    )
    assert np.array(evaluation["lengths"]).tolist() == [[len(row["chosen"]) + 1, len(row["rejected"]) + 1]
                                                        for row in rows]


def test_policy_is_hashed_once(tmp_path, monkeypatch):
    "It is constant, and may be large. Red if each checkpoint reads all its weights."
    calls, work = [], reward.base_identity
    monkeypatch.setattr(reward, "base_identity", lambda model: (calls.append(1), work(model))[1])
    train_reward(reward_cfg(tmp_path, "run", every=1), tmp_path / "runs")
    assert len(calls) <= 1


def test_plot_of_a_run_on_pairs(tmp_path):
    "Loss, accuracy, calibration, length."
    train_reward(reward_cfg(tmp_path, "pairs"), tmp_path / "runs")
    axes = plot_runs([tmp_path / "runs" / "pairs"]).axes
    assert len(axes) == 4 and all(panel.lines or panel.collections for panel in axes)


def test_plot_of_a_run_on_single_responses_has_the_correlation(tmp_path):
    "Red if a panel with that title is empty."
    rows = [{"prompt": "", "completion": "a" * n, "reward": n} for n in range(8)]
    train_reward(reward_cfg(tmp_path, "single", rows), tmp_path / "runs")
    right = plot_runs([tmp_path / "runs" / "single"]).axes[1]
    assert "correlation" in right.get_title() and right.lines


def test_calibration_and_correlation_by_hand():
    "Five pairs in two bins; a model that is confident and right, or confident and wrong."
    assert [bin.pairs for bin in calibration(np.array([0.1, -0.2, 3.0, 4.0, 5.0]), 2)] == [3, 2]
    low, high = calibration(np.array([0.0, 0.0, -20.0, -20.0]), 2)
    assert (low.confidence, low.accuracy) == (0.5, 0.5)
    assert high.confidence > 0.999 and high.accuracy == 0
    assert (
        correlation(np.array([1.0, 2, 3]), np.array([-2.0, -4, -6])) == pytest.approx(-1)
        and correlation(np.ones(3), np.arange(3)) == 0
    )
    scores = np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [0.5, 0.5]])
    metrics = RewardEvaluation(scores, np.array([[2, 1]] * 4), np.zeros(4), 3.0).summary()
    assert metrics["accuracy"] == 0.625
    confidence = 1 / (1 + np.exp(-3.0 * np.array([0.0, 1.0, 1.0, 2.0])))  # four bins of one, in this order
    wanted = np.abs(confidence - [0.5, 1.0, 0.0, 1.0]).mean()
    assert metrics["calibration_error"] == pytest.approx(wanted)
    assert metrics["length_correlation"] == pytest.approx(np.corrcoef(scores.ravel(), [2, 1] * 4)[0, 1])


# ---- in PPO

def test_ctrl_c_during_compilation_of_a_reward_loses_nothing(monkeypatch):
    "The repeated step is bit-identical. Red if the model keeps tracers in place of its weights."
    judge = TrainedReward(scalar(), Letters("abcdefgh"), PLAIN)
    calm = task(judge, batch=8, steps=2, response_length=4).step()
    work, calls = reward_model.last_score, []
    def pressed(*args):
        found = work(*args)
        calls.append(1)
        if len(calls) == 1: raise KeyboardInterrupt
        return found
    monkeypatch.setattr(reward_model, "last_score", pressed)
    cut = task(TrainedReward(judge.model, judge.tokenizer, PLAIN), batch=8, steps=2, response_length=4)
    with pytest.raises(KeyboardInterrupt): cut.step()
    assert cut.step()["reward"] == calm["reward"]


def test_ctrl_c_during_compilation_of_an_evaluation_loses_nothing(tmp_path, monkeypatch):
    "The same in reward training."
    trainer, work, calls = trainer_on(tmp_path, pairs(8), pairs(8, 1)), reward_model.last_score, []
    def pressed(*args):
        found = work(*args)
        calls.append(1)
        if len(calls) == 1: raise KeyboardInterrupt
        return found
    trainer.step()
    monkeypatch.setattr(reward_model, "last_score", pressed)
    with pytest.raises(KeyboardInterrupt): trainer.evaluate()
    assert 0 <= trainer.evaluate()["val_accuracy"] <= 1 and trainer.step()["step"] == 2


def test_scoring_does_not_hash_the_weights(monkeypatch):
    "The name is needed for errors only. Red if each step copies and hashes all weights of the reward model."
    judge, calls, work = TrainedReward(scalar(), Letters("abcdefgh"), PLAIN), [], reward_model.tree_flatten
    monkeypatch.setattr(reward_model, "tree_flatten", lambda tree: (calls.append(1), work(tree))[1])
    for _ in range(3): score(judge, ["a"], ["b"])
    assert len(calls) <= 1


def test_reward_name_does_not_depend_on_the_path(tmp_path, monkeypatch):
    "A run's name, its directory, its full path: a resumed PPO must not reset its best for that."
    monkeypatch.chdir(tmp_path)
    train_reward(reward_cfg(tmp_path, "mine"), "runs")
    names = [reward_name(load_reward(path)) for path in ("mine", "runs/mine", tmp_path / "runs" / "mine",
                                                         "runs/mine/model")]
    assert len({name.partition(" ")[2] for name in names}) == 1  # weights, mean and standard deviation
    assert len({PPOTrainer(ppo_cfg(tmp_path, "al"), reward=path).reward_name
                for path in ("mine", str(tmp_path / "runs" / "mine"))}) == 1


def ppo_cfg(home, name, lora=2, steps=5, every=2, resume=False, hyper=None, **data):
    if not (home / "base").exists(): export(small().model, ByteTokenizer(), home / "base")
    rows = write(home / "asked.jsonl", [{"prompt": text} for text in ("a", "bc", "hello there")])
    return PPOConfig.model_validate_json(
        json.dumps(
            {
                "name": name,
                "pretrained_model": str(home / "base"),
                "resume": {"checkpoint": "latest" if resume else None},
                "data": {
                    "input_file": rows,
                    "response_length": 4,
                    "ppo_mini_batch_size": 4,
                    "ppo_epochs": 2,
                    **data,
                },
                "training": {
                    "hyperparameters": {
                        "batch_size": 8,
                        "learning_rate": 1e-2,
                        "iters": steps,
                        **(hyper or {}),
                    },
                    "lora": {"rank": lora},
                },
                "logging": {
                    "keep_last": 50,
                    "steps": {"checkpoint_interval": every, "validation_interval": 3, "logging_interval": 1},
                },
            }
        )
    )


def number(prompt, response): return sum(ord(c) % 7 for c in response) / 10


def test_killed_and_resumed_lora_ppo_is_bit_identical(tmp_path):
    "Its checkpoints hold adapters and the critic's head, neither the base nor a reference."
    held_out = {"validation_file": write(tmp_path / "h.jsonl", [{"prompt": "zz"}, {"prompt": "q"}])}
    calm = ppo(ppo_cfg(tmp_path, "calm", **held_out), tmp_path / "runs", reward=number)
    with pytest.raises(Killed):
        ppo(ppo_cfg(tmp_path, "cut", **held_out), tmp_path / "runs", reward=number, callbacks=[stop_after(4)])
    assert checkpoints(tmp_path / "runs" / "cut")[-1].name == "step_000003"          # the best so far
    resumed = ppo_cfg(tmp_path, "cut", resume=True, **held_out)
    check_same_end(calm, ppo(resumed, tmp_path / "runs", reward=number))
    arrays, state = load_checkpoint(checkpoints(calm)[-1])
    names = {group: {name.rpartition(".")[2] for name in weights}
             for group, weights in arrays.items() if group != "optimizer"}
    assert names == {"model": {"lora_a", "lora_b"}, "critic": {"lora_a", "lora_b", "weight"}}
    assert [name for name in arrays["critic"]
            if name.endswith("weight")] == ["score.weight"] and state["base"]["lora"]["rank"] == 2
    assert {file.name for file in (calm / "adapters").iterdir()} == {
        "adapters.safetensors", "adapter_config.json", "mlx_pretrain.sha256.json"}
    whole, _ = load_checkpoint(checkpoints(ppo(ppo_cfg(tmp_path, "whole", lora=0, steps=1), tmp_path / "runs",
                                               reward=number))[-1])
    assert "reference" in whole  # negative control: without adapters it must be there


def with_lora(pretrained=None, **more):
    "A `PPOTrainer` on letters with LoRA adapters."
    pretrained, more = pretrained or tiny(loud=8), {"steps": 4, "batch": 8, "lr": 1e-2, "response_length": 6,
                                                    **more}
    cfg = task(count_a, prompts=("a", "bcd"), pretrained=pretrained, **more).cfg
    cfg = cfg.model_copy(update={"training": cfg.training.model_copy(update={"lora": LoRAConfig(rank=2)})})
    return PPOTrainer(cfg, pretrained, reward=count_a)


def test_lora_reference_is_the_base_exactly():
    "Bit-identical log-probabilities, before and after training; and the KL of the first step is exactly 0."
    base, trainer = tiny(loud=8).model, with_lora()
    read = make_forward(base, base, trainer.trained.critic)
    for n in range(3):
        metrics = trainer.step()
        r = trainer.rollout
        logp, ref_logp, *_ = read(r.tokens, r.pad, r.response_mask, mx.array(1.0))
        assert mx.array_equal(r.ref_logp, ref_logp) and mx.array_equal(logp, ref_logp)
        assert (metrics["kl"] == 0) == (n == 0) and mx.array_equal(r.logp, r.ref_logp) == (n == 0)


def address(w): return np.asarray(memoryview(w)).__array_interface__["data"][0]


def test_lora_policy_critic_and_reference_share_weights():
    "One copy in memory, also after steps. Red if the base is copied for one of them."
    wide = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "head_dim": 64,
            "tie_word_embeddings": False}
    pretrained = small(Letters("abcdefgh"), **wide)
    mx.eval(pretrained.model.parameters())
    size = sum(w.nbytes for _, w in tree_flatten(pretrained.model.parameters()))
    before = mx.get_active_memory()
    trainer = with_lora(pretrained)
    for _ in range(2): trainer.step()
    mx.eval(trainer.trained.parameters(), trainer.optimizer.state, trainer.reference.parameters())
    assert mx.get_active_memory() - before < 0.5 * size
    policy, critic, reference = (dict(tree_flatten(m.parameters()))
                                 for m in (trainer.model, trainer.trained.critic, trainer.reference))
    for name, w in reference.items():
        assert address(w) == address(policy[name])
        assert name.startswith("lm_head") or address(w) == address(critic[name])
    full = task(count_a, pretrained=tiny(loud=8), batch=8, response_length=4)
    full.step()
    # negative control: without adapters they are separate
    assert address(full.model.lm_head.weight) != address(full.reference.lm_head.weight)


def test_forecast_does_not_change_lora_training():
    "Red if weights, optimizer state or counters differ from a training without a forecast."
    plain, forecasted = with_lora(), with_lora()
    for _ in range(2):
        forecast(forecasted)
        plain.step()
        forecasted.step()
    for (_, a), (_, b) in zip(
        *(tree_flatten([t.trained.parameters(), t.optimizer.state]) for t in (plain, forecasted)), strict=True
    ):
        assert mx.array_equal(a, b)
    assert plain.state() == forecasted.state()


def changed(trainer):
    "The trained parameters that three steps change; without a gradient Adam changes nothing."
    before = {name: np.array(w) for name, w in tree_flatten(trainer.trained.parameters())}
    for _ in range(3): trainer.step()
    return {name for name, w in tree_flatten(trainer.trained.parameters())
            if not np.array_equal(before[name], np.array(w))}


def test_every_adapter_and_the_critic_head_get_a_gradient(monkeypatch):
    "Adapters of policy and critic, and the critic's head; nothing else."
    trainer = with_lora()
    wanted = {name for name, _ in tree_flatten(trainer.trained.parameters())
              if name.endswith(("lora_a", "lora_b")) or "score" in name}
    assert (
        changed(trainer) == wanted
        and len(wanted) == 2 * 2 * 7 + 1
        and not trainer.reference.trainable_parameters().get("lm_head")
    )
    unfreeze = Linear.unfreeze
    frozen_head = lambda self, **kwargs: unfreeze(self, **kwargs) if kwargs else self
    monkeypatch.setattr(Linear, "unfreeze", frozen_head)
    assert "critic.score.weight" not in changed(with_lora())  # negative control: a frozen head


def test_adapters_of_the_initial_policy_are_merged():
    "The reference is the model with the adapters it was loaded with. Red if they are lost, or trained."
    start = tiny(loud=8)
    adapted = apply_lora(start.model, LoRAConfig(rank=2))
    adapted.update({"model": {"layers": [{"mlp": {"down_proj": {"lora_b": mx.ones((2, 32))}}}]}})
    trainer, ids = with_lora(start._replace(model=adapted)), mx.array([[1, 3, 4, 5]])
    assert (
        mx.abs(trainer.reference(ids) - adapted(ids)).max()
        < 1e-4
        < mx.abs(trainer.reference(ids) - start.model(ids)).max()
    )
    assert trainer.step()["kl"] == 0


def test_exported_lora_policy_is_the_trained_one(tmp_path):
    "The adapters are merged; log-probabilities differ by rounding at most."
    from mlx_pretrain.pretrained import load
    models = []
    run = ppo(ppo_cfg(tmp_path, "run"), tmp_path / "runs", reward=number,
              callbacks=[lambda trainer, _: models.append(trainer.model)])
    tokens, pad = mx.array([[257, 97, 98, 99]]), mx.array([0])
    (a, _), (b, _), (c, _) = (log_probs(m, tokens, pad, 3)
                              for m in (models[-1], load(run).model, load(tmp_path / "base").model))
    assert mx.abs(a - b).max() < 1e-5 < mx.abs(a - c).max()
    best = load(checkpoints(run)[-1]).model
    assert mx.abs(log_probs(best, tokens, pad, 3)[0] - a).max() < 1e-5


# ---- rules

def test_rules_by_hand():
    assert Length(4).compute_reward([""] * 5,
                                    ["a b c d", "a b", "", "a b c d e",
                                     "w " * 99]) == [1.0, 0.5, 0.0, 0.75, -1.0]
    assert Contains(("The boat", "sea")).compute_reward([""] * 3,
                                                        ["the BOAT at sea", "seaside, the boats",
                                                         "sea."]) == [1.0, 0.0, 0.5]
    assert Contains("C++").compute_reward([""] * 2, ["I like C++!", "C+"]) == [1.0, 0.0] and Contains(
        "a"
    ).words == ("a",)
    assert Matches(r"^\d+$").compute_reward([""] * 3, ["no\n12\nno", "12a", ""]) == [1.0, 0.0, 0.0]
    good, none, bad = Sentiment().compute_reward([""] * 3, ["What a wonderful, happy day!", "a table",
                                                            "I hate this awful mess."])
    assert 1 >= good > 0.5 > none == 0 > -0.5 > bad >= -1


def test_a_weighted_sum_by_hand(tmp_path):
    "Of rules, functions, and a reward in a file; nested sums."
    (tmp_path / "mine.py").write_text("def half(prompt, response): return 0.5\n")
    total = WeightedSum((2.0, Length(2)), (-1, count_a), (1, f"{tmp_path}/mine.py:half"))
    assert total.compute_reward(["", ""], ["a a", "x"]).tolist() == [2.25, 1.5]
    assert WeightedSum((10, total)).compute_reward(["", ""], ["a a", "x"]).tolist() == [22.5, 15.0]
    assert (
        repr(WeightedSum((0.5, Length(3)), (1, Contains("a"))))
        == "WeightedSum(0.5 Length(words=3), 1 Contains(words=('a',)))"
    )


def test_weighted_sum_of_a_reward_model_and_a_rule(tmp_path):
    run = train_reward(reward_cfg(tmp_path, "mine"), tmp_path / "runs")
    total = WeightedSum((1.0, str(run)), (0.5, Length(1)))
    alone = load_reward(run).compute_reward(["", ""], ["aa", "b"])
    assert np.abs(total.compute_reward(["", ""], ["aa", "b"]) - alone - 0.5).max() < 1e-6


@pytest.mark.parametrize("rule, arguments, part", [
    (Length, [0], "Length(0)"), (Contains, [()], "Contains"), (Contains, [("a", "")], "empty"),
    (Matches, ["("], "'('"), (WeightedSum, [], "at least one"),
    (WeightedSum, [(float("nan"), count_a)], "finite"), (WeightedSum, [count_a], "pairs"),
    (WeightedSum, [("much", count_a)], "pairs"), (WeightedSum, [(1, 7)], "7"),
    (WeightedSum, [(1, "nowhere")], "nowhere")])
def test_invalid_rule_arguments_are_reported(rule, arguments, part):
    with pytest.raises(RewardError) as caught: rule(*arguments)
    assert part in str(caught.value) and "\n" not in str(caught.value)


def test_failing_part_of_a_sum_is_named():
    def broken(prompt, response): return 1 / 0
    with pytest.raises(RewardError) as caught: score(WeightedSum((1, Length(2)), (1, broken)), ["a"], ["b"])
    assert (
        "broken" in str(caught.value)
        and "WeightedSum" not in str(caught.value)
        and "test_reward.py" in str(caught.value)
    )


def test_help_of_reward_model_mentions_a_run():
    "The description of `reward_model` in `--help` and the documentation names trained reward models."
    assert "run" in PPOConfig.model_fields["reward_model"].description.split("without it")[0]
