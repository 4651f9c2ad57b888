"Reinforcement learning and its faults: Ctrl-C, a killed process, a failing reward, bad rows."
import json
from pathlib import Path

import numpy as np
import pytest

from mlx_pretrain import ppo as ppo_module
from mlx_pretrain import rl_trainer, rollout
from mlx_pretrain.chat import prompt_pieces
from mlx_pretrain.checkpoint import load_checkpoint
from mlx_pretrain.config import UserError
from mlx_pretrain.core import RewardModel
from mlx_pretrain.guards import Guards
from mlx_pretrain.lora import LoRAConfig, apply_lora
from mlx_pretrain.model import Llama, LlamaArgs
from mlx_pretrain.ops import head_logprobs
from mlx_pretrain.ppo import PPOConfig, PPOTrainer, ppo
from mlx_pretrain.pretrained import Pretrained, export
from mlx_pretrain.prompt import PromptFormat, encode_pieces
from mlx_pretrain.rollout import policy_loss
from mlx_pretrain.run import checkpoints, read_metadata, read_metrics
from mlx_pretrain.score import RewardError, score
from mlx_pretrain.tokenizer import ByteTokenizer, HFTokenizer
from mlx_pretrain.session import forecast
from mlx_pretrain.step import assign_arrays
import mlx.core as mx
from common import tokenizer
from toys import Letters
from mlx.utils import tree_flatten


def small(tok=None, seed=0):
    tok = tok or Letters("abcdefgh")
    args = LlamaArgs(vocab_size=tok.vocab_size, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                     num_attention_heads=2, num_key_value_heads=2, head_dim=8, tie_word_embeddings=False)
    return Pretrained(Llama(args, seed), tok, Path("small"))


def count_a(prompt, response): return response.count("a") / 8
def number(prompt, response): return sum(ord(c) % 7 for c in response) / 10


@pytest.fixture
def home(tmp_path):
    "A temporary directory with a base model, rows and configurations."
    return Home(tmp_path)


class Home:
    def __init__(self, path): self.path, self.runs = path, path / "runs"

    def rows(self, rows, name="rows.jsonl"):
        (self.path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(self.path / name)

    def cfg(self, rows=({"prompt": ""}, {"prompt": "ab"}, {"prompt": "abcabc"}), hyper=(), training=(),
            system=(), **data):
        data = {"input_file": self.rows(rows), "ppo_mini_batch_size": 4, "response_length": 6, **data}
        hyper = {"batch_size": 8, "learning_rate": 1e-2, "iters": 6, **dict(hyper)}
        return PPOConfig.model_validate_json(json.dumps(
            {"data": data, "training": {"hyperparameters": hyper, **dict(training)}, "system": dict(system)}))

    def trainer(self, *rows, reward=count_a, pretrained=None, **more):
        return PPOTrainer(self.cfg(*rows, **more), pretrained or small(), reward=reward)

    def run(self, name, resume=False, reward=number, every=2, callbacks=(), **data):
        "A complete run on bytes."
        if not (base := self.path / "base").exists():
            export(small(ByteTokenizer()).model, ByteTokenizer(), base)
        cfg = self.cfg([{"prompt": text} for text in ("a", "bc", "hello there")], **data)
        steps = {"checkpoint_interval": every, "validation_interval": 3, "logging_interval": 1}
        logging = cfg.logging.model_copy(update={"keep_last": 50,
                                                 "steps": cfg.logging.steps.model_copy(update=steps)})
        resume = cfg.resume.model_copy(update={"checkpoint": "latest"}) if resume else cfg.resume
        cfg = cfg.model_copy(update={"name": name, "pretrained_model": str(base), "logging": logging,
                                     "resume": resume})
        return ppo(cfg, self.runs, reward=reward, callbacks=callbacks)


def arrays(trainer): return [np.array(w) for _, w in tree_flatten(trainer.arrays())]
def same(a, b): return all(np.array_equal(x, y) for x, y in zip(arrays(a), arrays(b), strict=True))


class Killed(BaseException): pass


def once(monkeypatch, owner, name, nth, error, late=False):
    "The nth call of a function raises an error, before its work or (`late`) after it."
    calls, work = [], getattr(owner, name)
    def wrapped(*args, **kwargs):
        calls.append(name)
        if late: result = work(*args, **kwargs)
        if len(calls) == nth: raise error
        return result if late else work(*args, **kwargs)
    monkeypatch.setattr(owner, name, wrapped)
    return calls


# ---- a step is atomic

PHASES = [(rollout, "generate", 2), (rollout, "score", 2), (ppo_module, "make_rollout", 1),
          (ppo_module, "whiten", 2), (rl_trainer, "minibatches", 1), (rl_trainer, "minibatches", 6)]


@pytest.mark.parametrize("module, name, nth", PHASES)
def test_an_interrupted_step_resumes_to_the_same_bits(module, name, nth, home, monkeypatch):
    "Ctrl-C in any phase, then step(). Red if a phase is done twice, or its samples are drawn again."
    calm, cut = home.trainer(), home.trainer()
    for _ in range(2): calm.step()
    once(monkeypatch, module, name, nth, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        while cut.steps_done < 2: cut.step()
    while cut.steps_done < 2: cut.step()
    assert same(calm, cut) and calm.rewards == cut.rewards and calm.guards.state() == cut.guards.state()
    assert calm.sampled.responses == cut.sampled.responses and calm.tokens == cut.tokens


@pytest.mark.parametrize("share", [0.75, 0.25])
def test_target_kl_counts_all_updates_of_an_interrupted_epoch(share, home, monkeypatch):
    """`target_kl` is above or below the mean of an epoch's two updates, but not above the second. Red if the
    mean forgets the update before the interruption."""
    probe = home.trainer()
    phases = probe.phases()
    while not probe.partial_step or len(probe.partial_step.updates) < 2: next(phases)
    target_kl = share * probe.partial_step.updates[1]["approx_kl"]
    calm, cut = (home.trainer(target_kl=target_kl) for _ in range(2))
    calls = once(monkeypatch, cut, "apply_update", 2, KeyboardInterrupt())
    calm.step()
    with pytest.raises(KeyboardInterrupt): cut.step()
    cut.step()
    assert same(calm, cut) and (len(calls) == 3) == (share == 0.25)  # two updates, one of them tried twice


def test_ctrl_c_during_an_update_does_not_apply_it_twice(home, monkeypatch):
    "KeyboardInterrupt is raised when the compiled function returns: the weights are new, but not recorded."
    calm, cut = home.trainer(), home.trainer()
    calm.step()
    calls = once(monkeypatch, cut, "update", 3, KeyboardInterrupt(), late=True)
    with pytest.raises(KeyboardInterrupt): cut.step()
    cut.step()
    assert len(calls) > 3 and same(calm, cut)


@pytest.mark.parametrize("module, name", [(rollout, "log_probs"), (ppo_module, "log_probs"),
                                          (ppo_module, "policy_loss")])
def test_ctrl_c_while_a_function_is_compiled_loses_nothing(module, name, home, monkeypatch):
    "Compiling takes a large part of the first step, and of each with a new shape."
    calm, cut = home.trainer(), home.trainer()
    calm.step()
    once(monkeypatch, module, name, 1, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt): cut.step()
    cut.step()
    assert same(calm, cut)


@pytest.mark.long
@pytest.mark.parametrize("owner, name, nth", [(rollout, "generate", 6), (rl_trainer, "minibatches", 24),
                                              (PPOTrainer, "apply_update", 50)])
def test_a_killed_run_resumes_to_the_same_bits(owner, name, nth, home, monkeypatch):
    "Killed while sampling or in an update: the resumed run has the same bits, state and metrics."
    held_out = {}
    if name != "generate":
        held_out["validation_file"] = home.rows([{"prompt": "zz"}, {"prompt": "q"}], "held.jsonl")
    calm = home.run("calm", **held_out)
    with monkeypatch.context() as patch:
        once(patch, owner, name, nth, Killed())
        with pytest.raises(Killed): home.run("cut", **held_out)
    assert 0 < len(checkpoints(home.runs / "cut")) < len(checkpoints(calm))
    cut = home.run("cut", resume=True, **held_out)
    (a, a_state), (b, b_state) = (load_checkpoint(checkpoints(run)[-1]) for run in (calm, cut))
    assert all(mx.array_equal(x, y) for (_, x), (_, y) in zip(tree_flatten(a), tree_flatten(b), strict=True))
    assert a_state == b_state
    lines = [[{k: v for k, v in row.items() if k != "tokens_per_second"}
              for row in read_metrics(run) if "event" not in row] for run in (calm, cut)]
    assert lines[0] == lines[1]


def test_a_checkpoint_holds_the_state_of_the_guards(home):
    "A guard that waits for five steps in a row must not wait for six because the run was resumed."
    def end(trainer, metrics):
        if metrics["step"] == 3: raise Killed
    with pytest.raises(Killed): home.run("cut", callbacks=[end], reward=lambda p, r: 1.0)
    [path] = checkpoints(home.runs / "cut")
    assert load_checkpoint(path)[1]["guards"]["consecutive"]["equal_rewards"] == 2


def test_a_step_that_a_guard_stops_is_not_saved(home):
    "When training stops because the policy broke, the latest checkpoint is not of the broken policy."
    with pytest.raises(UserError, match="learning_rate"):
        home.run("wild", every=1, hyper={"learning_rate": 5.0})
    assert not checkpoints(home.runs / "wild")


def test_a_reward_that_fails_loses_nothing(home, caplog):
    "The steps before are saved, and a message says how to resume."
    done = []
    def gone(prompt, response):
        if len(done) == 2: raise OSError("the server is gone")
        return number(prompt, response)
    with pytest.raises(RewardError):
        home.run("gone", every=500, reward=gone, callbacks=[lambda t, m: done.append(m)])
    assert [path.name for path in checkpoints(home.runs / "gone")] == ["step_000002"]
    assert "step_000002" in caplog.text and "--resume.checkpoint latest" in caplog.text


def test_another_reward_resets_the_best_validation(home):
    "Validations by another reward cannot be compared with those before."
    held_out = {"validation_file": home.rows([{"prompt": "zz"}, {"prompt": "q"}], "held.jsonl")}
    def end(trainer, metrics):
        if metrics["step"] == 5: raise Killed
    with pytest.raises(Killed):
        home.run("cut", callbacks=[end], reward=lambda p, r: 100 + number(p, r), **held_out)
    assert read_metadata(home.run("cut", resume=True, **held_out))["best"]["val_reward"] < 50


def test_a_resumed_run_keeps_its_knobs_unless_the_configuration_changed(home):
    "Red if a resumed run forgets a knob, or ignores a new kl_coef in the YAML."
    def end(trainer, metrics):
        if metrics["step"] == 1: trainer.knobs.temperature = 0.9
        if metrics["step"] == 5: raise Killed
    with pytest.raises(Killed): home.run("cut", callbacks=[end])
    knobs = []
    def record(trainer, metrics):
        knobs.append((trainer.last_knobs["kl_coef"], trainer.last_knobs["temperature"]))
    run = home.run("cut", resume=True, kl_coef=2.5, callbacks=[record])
    assert {*knobs} == {(2.5, 0.9)}
    events = [row for row in read_metrics(run) if row.get("event") == "knob"]
    assert [(row["name"], row["step"]) for row in events] == [("temperature", 1), ("kl_coef", 4)]


# ---- the forecast

def test_a_forecast_leaves_no_trace(home):
    "Red if a timing step is counted, reaches the guards, or changes weights, optimizer state or knobs."
    plain, timed = home.trainer(), home.trainer()
    for _ in range(2):
        forecast(timed)
        plain.step(), timed.step()
    assert same(plain, timed) and plain.state() == timed.state()


def test_a_forecast_that_is_interrupted_leaves_no_trace(home):
    "Ctrl-C, or a reward that fails in the second timing step: the trainer is unchanged."
    calls = []
    def gone(prompt, response):
        calls.append(prompt)
        if len(calls) > 10: raise OSError("gone")
        return 0.1 * len(calls)
    trainer = home.trainer(reward=gone)
    before = arrays(trainer)
    with pytest.raises(RewardError): forecast(trainer)
    assert all(np.array_equal(a, b) for a, b in zip(before, arrays(trainer), strict=True))


# ---- guards

def test_a_warning_of_a_guard_does_not_mark_later_steps_as_bad(home):
    "The last good checkpoint of a run that fails much later is not the one before a harmless warning."
    trainer = home.trainer([{"prompt": ""}],
                           reward=lambda p, r: 1.0 if trainer.steps_done < 3 else count_a(p, r),
                           hyper={"iters": 8})
    for _ in range(8): trainer.step()
    assert trainer.last_good() == 8


def test_a_step_that_is_not_finite_is_no_explosion():
    "Such steps are skipped and counted; the guard's remedy would be wrong. Red if a NaN is an outlier."
    zero, true = mx.array([[0.0]]), mx.array([[True]])
    _, count, stats = policy_loss(mx.array([[mx.nan]]), zero, zero, true, 0.2)
    metrics = dict.fromkeys(("reward", "reward_std", "kl", "entropy", "eos_fraction", "response_length"), 1.0)
    metrics |= {key: (value / count).item() for key, value in stats.items()}
    assert Guards().check(metrics, {"kl_coef": 0.1}) == []


def test_the_report_of_a_skipped_update_is_correct(home, monkeypatch, caplog):
    "The other updates of the step have changed the weights."
    trainer, calls = home.trainer(), []
    work, before = trainer.update, arrays(trainer)
    def broken(batches, rate):
        calls.append(rate)
        if len(calls) != 2: return work(batches, rate)
        old = {name: dict(tree_flatten(tree)) for name, tree in trainer.arrays().items()}
        loss, count, norm, _, means = work(batches, rate)
        for name, tree in trainer.checkpoint_trees().items(): assign_arrays(tree, old[name])
        return mx.array(float("inf")), count, norm, mx.array(False), means
    monkeypatch.setattr(trainer, "update", broken)
    trainer.step()
    assert not all(np.array_equal(a, b) for a, b in zip(before, arrays(trainer), strict=True))
    assert "weights unchanged" not in caplog.text and "of which 1 were skipped" in caplog.text


# ---- knobs

@pytest.mark.parametrize("name, value", [("kl_coef", 2.0), ("clip_range", 0.001), ("temperature", 0.4),
                                         ("target_kl", 1e-6)])
def test_a_knob_equals_the_configured_value(name, value, home):
    """Changed after everything was compiled, it applies in the very next step, to the same bits. Red if a
    number is constant in compiled code."""
    written, turned, plain = home.trainer(**{name: value}), home.trainer(), home.trainer()
    forecast(turned)                                                      # compiles
    setattr(turned.knobs, name, value)
    for trainer in (written, turned, plain): trainer.step(), trainer.step()
    assert same(written, turned) and not same(turned, plain)


@pytest.mark.parametrize("name, value", [("temperature", 0.0), ("temperature", -1.0), ("clip_range", -0.1),
                                         ("kl_coef", -1.0)])
def test_a_knob_checks_its_range(name, value, home):
    "A temperature of 0 divides by zero, and each step from then on is NaN."
    with pytest.raises(ValueError, match=name): setattr(home.trainer().knobs, name, value)


# ---- mathematics

def test_accumulated_minibatches_equal_one_large_one(home):
    "Unequal numbers of tokens, a smaller last mini-batch. Red if a mean of means is taken."
    trainers = []
    for size, accumulation in ((8, 1), (4, 2), (3, 3)):
        hyper = {"gradient_accumulation_steps": accumulation}
        trainers.append(home.trainer(hyper=hyper, ppo_mini_batch_size=size))
        trainers[-1].step()
    lengths = trainers[0].rollout.response_mask.sum(axis=1)
    assert lengths.max() > lengths.min()
    for other in trainers[1:]:
        pairs = zip(arrays(trainers[0]), arrays(other), strict=True)
        assert max(np.abs(a - b).max() for a, b in pairs) < 1e-5


def test_gradient_checkpointing_changes_no_bit(home):
    "Sampling with a cache, scoring and updating. Red if a checkpointed block ignores the cache."
    plain, checkpointed = home.trainer(), home.trainer(system={"gradient_checkpointing": True})
    for trainer in (plain, checkpointed): trainer.step()
    assert same(plain, checkpointed)


def test_log_probabilities_in_chunks_equal_those_at_once():
    "Values and gradients over a vocabulary of several chunks. Red if a chunk loses gradient or temperature."
    rng = np.random.default_rng(0)
    h, w = mx.array(rng.normal(size=(3, 70, 8)), mx.float32), mx.array(rng.normal(size=(5000, 8)), mx.float32)
    t = mx.array(rng.integers(0, 5000, (3, 70)), mx.int32)
    g = mx.array(rng.normal(size=(2, 3, 70)), mx.float32)
    def chunked(h, w): return sum((x * y).sum() for x, y in zip(head_logprobs(h, w, t, 0.7), g))
    def at_once(h, w):
        logits = h @ w.T / 0.7
        logp = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        entropy = -(mx.exp(logp) * logp).sum(axis=-1)
        return (mx.take_along_axis(logp, t[..., None], axis=-1)[..., 0] * g[0] + entropy * g[1]).sum()
    (a, da), (b, db) = (mx.compile(mx.value_and_grad(f, argnums=(0, 1)))(h, w) for f in (chunked, at_once))
    assert abs(a.item() - b.item()) < 1e-2 and all(mx.abs(x - y).max().item() < 1e-3 for x, y in zip(da, db))


def test_row_logratio_is_a_log_ratio(home):
    "`row_logratio` is the mean log-ratio of rows to the reference, also if the KL estimator is k3."
    rows = [{"prompt": "ab", "completion": text, "reward": text.count("a")} for text in ("a", "b", "aab")]
    trainer = home.trainer(rows, reward=None, kl_estimator="k3")
    for _ in range(3): metrics = trainer.step()
    ratio = np.array((trainer.rollout.logp - trainer.rollout.ref_logp).sum(axis=1)).mean()
    assert abs(metrics["row_logratio"] - ratio) < 1e-5


def test_few_widths_are_compiled(home):
    "Each width of responses is compiled separately; from 1 to 24 tokens there are 1 to 4, 8, 12, 16 and 32."
    trainer = home.trainer([{"prompt": "ab"}], response_length=24,
                           hyper={"batch_size": 2, "iters": 30, "learning_rate": 1e-9}, ppo_epochs=1)
    widths = set()
    for _ in range(16):
        trainer.step()
        widths.add(trainer.rollout.response_mask.shape[1])
    assert widths <= {1, 2, 3, 4, 8, 12, 16, 32}


# ---- validation

def test_evaluation_covers_all_held_out_prompts(home):
    "Five prompts in batches of two. Red if a smaller last batch weighs as much as the others."
    held_out = {"validation_file": home.rows([{"prompt": p} for p in ("a", "b", "cde", "e", "f")],
                                             "held.jsonl")}
    trainer = home.trainer(hyper={"batch_size": 2}, **held_out)
    for _ in range(3): trainer.step()
    before, measured = arrays(trainer), trainer.evaluate()
    sampled = trainer.sample(trainer.held_out, np.arange(5), trainer.last_knobs, -1)
    rollout, metrics = trainer.score_samples(sampled, trainer.last_knobs)
    errors = np.array(mx.square(rollout.values - rollout.returns))[np.array(rollout.response_mask)]
    expected = {"val_reward": sampled.scores.mean(), "val_kl": metrics["kl"],
                "val_loss": 0.1 * 0.5 * errors.mean()}
    assert measured.keys() == expected.keys()
    assert all(abs(measured[key] - expected[key]) < 1e-6 for key in expected)
    assert measured == trainer.evaluate()
    assert all(np.array_equal(a, b) for a, b in zip(before, arrays(trainer), strict=True))


def test_equal_held_out_prompts_get_different_responses(home):
    "32 times the same prompt is a mean of 32 responses, whatever the batch size."
    held_out = {"validation_file": home.rows([{"prompt": "a"}] * 32, "held.jsonl")}
    few, many = (home.trainer(hyper={"batch_size": size}, **held_out).evaluate()["val_reward"]
                 for size in (2, 32))
    assert few == many


# ---- rewards

class Wrong(RewardModel):
    def __init__(self, answer): self.answer = answer
    def compute_reward(self, prompts, responses): return self.answer


class Attached:
    def __array__(self, *args, **kwargs):
        raise RuntimeError("Can't call numpy() on Tensor that requires grad.")


@pytest.mark.parametrize("answer", [[10**400, 1], Attached()],
                         ids=["a huge integer", "a tensor with a gradient"])
def test_a_bad_return_value_of_a_reward_is_an_error_message(answer):
    "Red if a traceback comes out of NumPy."
    with pytest.raises(RewardError, match="Wrong"): score(Wrong(answer), ["a", "b"], ["c", "d"])


def test_strings_are_not_accepted_as_rewards():
    "They may come from a CSV file."
    with pytest.raises(RewardError, match="not numbers"): score(Wrong(["1", "2"]), ["a", "b"], ["c", "d"])


def test_a_huge_reward_is_refused_or_its_steps_are_finite(home):
    trainer = home.trainer(reward=lambda p, r: 1e25 * r.count("a"))
    try: trainer.step()
    except RewardError: return
    assert trainer.skipped == 0


def test_a_reward_that_returns_none_is_reported(home):
    "A function without a return: the message names it, and no line of another file."
    with pytest.raises(RewardError) as caught: home.trainer(reward=lambda p, r: None).step()
    assert "core.py" not in str(caught.value)


# ---- rows

def message(role, text): return {"role": role, "content": text}


def test_the_last_answer_of_a_conversation_is_the_response(home):
    "Earlier answers are part of the prompt; with a chat template, with a format, and without a bos token."
    messages = [message("user", "q"), message("assistant", "early"), message("user", "p <eos>"),
                message("assistant", "late")]
    rows = [{"messages": messages, "reward": 1.0}, {"messages": messages[2:], "reward": 0.0}]
    folder = home.path / "tok"
    ByteTokenizer().save(folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<bos>{{ m.role }}:{{ m.content }}"
        "{% if m.role == 'assistant' %}<eos>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<bos>assistant:{% endif %}")
    for tok, fmt in ((HFTokenizer(folder), PromptFormat(prompt_format=None)), (ByteTokenizer(), None)):
        off_policy = home.trainer(rows, reward=None, pretrained=small(tok)._replace(format=fmt))
        on_policy = home.trainer(rows, pretrained=small(tok)._replace(format=fmt))
        assert off_policy.data.prompts == on_policy.data.prompts
        assert "early" in tok.decode(on_policy.data.prompts[0])
        assert [tok.decode(r) for r in off_policy.data.responses] == ["late"] * 2
        assert all(r[-1] == tok.eos_id for r in off_policy.data.responses)
        off_policy.step(), on_policy.step()
        assert {*off_policy.sampled.response_texts} == {"late"}


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "huggingface"])
def test_prompts_have_the_tokens_of_fine_tuning(kind, home):
    "With and without a response a row has the same prompt. Red if a response changes its tokenization."
    row = {"instruction": "the old man ", "response": " counts", "reward": 1}
    fmt = PromptFormat()
    tok = tokenizer(kind)
    prompt = encode_pieces(tok, [prompt_pieces(fmt, tok, row)])[0].ids
    trainer = home.trainer([row], reward=None, pretrained=small(tok))
    assert trainer.data.prompts == [prompt]
    trainer.step()
    assert trainer.sampled.response_texts[0].strip() == "counts"


def test_prompts_that_fill_the_context(home):
    """A full context is fine, one token more is an error with file and line; responses of one token and a
    batch of one are fine."""
    full = {"prompt": "abcabc"}                                           # 7 tokens with bos
    home.trainer([full], response_length=9, preprocessing={"max_context_size": 16}).step()
    with pytest.raises(UserError, match="rows.jsonl, line 1.*response_length"):
        home.trainer([full], response_length=10, preprocessing={"max_context_size": 16})
    metrics = home.trainer([full], response_length=1, hyper={"batch_size": 1}, ppo_mini_batch_size=100).step()
    assert metrics["response_length"] == 1 and metrics["tokens"] == 1


def test_a_bad_first_row_can_be_skipped(home):
    "A first row without a response is as bad as a later one."
    good = [{"prompt": "ab", "completion": text, "reward": 1.0} for text in "ab"]
    trainer = home.trainer([{"prompt": "ab", "reward": 1.0}, *good], reward=None, on_bad_row="skip")
    assert len(trainer.data) == 2


def test_of_two_consecutive_answers_the_last_is_the_response(home):
    "The question between them has no tokens; the response ends once."
    turns = (("user", "q"), ("assistant", "a"), ("user", ""), ("assistant", "b"))
    rows = [{"messages": [message(role, text) for role, text in turns], "reward": 1.0}]
    trainer = home.trainer(rows, reward=None, pretrained=small(ByteTokenizer()),
                           prompt_format="{instruction}")
    assert trainer.data.responses == [[ord("b"), ByteTokenizer().eos_id]]


MESSAGES = PromptFormat(input_field="messages", output_field="messages")


@pytest.mark.parametrize("row", [{"messages": [message("user", "a")], "tools": [1]}, {"messages": "hello"}])
def test_conversations_are_checked_as_for_fine_tuning(row):
    "Bad tools, and a string in place of a conversation."
    with pytest.raises(UserError): prompt_pieces(MESSAGES, tokenizer("bytes"), row)


def test_the_prompt_of_a_conversation_in_two_columns():
    "The prompt includes the turns of the second column before its last answer."
    completion = [message("assistant", "early"), message("user", "p"), message("assistant", "late")]
    row = {"prompt": [message("user", "q")], "completion": completion}
    fmt, tok = PromptFormat(input_field="prompt", output_field="completion"), tokenizer("bytes")
    assert "early" in tok.decode(encode_pieces(tok, [prompt_pieces(fmt, tok, row)])[0].ids)


def test_parse_response_removes_only_the_format():
    "Nothing follows the response in this format, so its end is kept."
    fmt = PromptFormat(response_format="{instruction}: {response}")
    assert fmt.parse_response("q: the answer is: ").endswith("the answer is: ")


def test_a_model_with_adapters_is_merged_or_refused(home):
    "A model that was fine-tuned with LoRA in the same process."
    start = small()
    try: home.trainer(pretrained=start._replace(model=apply_lora(start.model, LoRAConfig(rank=2)))).step()
    except UserError: pass
