"Reinforcement learning under attack: what holds although somebody presses Ctrl-C, kills it, or feeds it nonsense."
import json
from pathlib import Path

import numpy as np
import pytest

from mlx_pretrain import ppo as module
from mlx_pretrain.chat import ask_pieces
from mlx_pretrain.checkpoint import load_checkpoint
from mlx_pretrain.config import UserError
from mlx_pretrain.core import RewardModel
from mlx_pretrain.guards import Guards
from mlx_pretrain.lora import LoRAConfig, apply_lora
from mlx_pretrain.model import Llama, LlamaArgs
from mlx_pretrain.ops import head_logprobs
from mlx_pretrain.ppo import PPOConfig, PPOTrainer, policy_loss, ppo
from mlx_pretrain.pretrained import Pretrained, export
from mlx_pretrain.prompt import PromptFormat, encode_pieces
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
    "A folder with a model to begin with, a file of rows, and what makes configurations."
    return Home(tmp_path)


class Home:
    def __init__(self, path): self.path, self.runs = path, path / "runs"

    def rows(self, rows, name="rows.jsonl"):
        (self.path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(self.path / name)

    def cfg(self, rows=({"prompt": ""}, {"prompt": "ab"}, {"prompt": "abcabc"}), hyper=(), training=(), system=(), **data):
        data = {"input_file": self.rows(rows), "ppo_mini_batch_size": 4, "response_length": 6, **data}
        hyper = {"batch_size": 8, "learning_rate": 1e-2, "iters": 6, **dict(hyper)}
        return PPOConfig.model_validate_json(json.dumps(
            {"data": data, "training": {"hyperparameters": hyper, **dict(training)}, "system": dict(system)}))

    def trainer(self, *rows, reward=count_a, pretrained=None, **more):
        return PPOTrainer(self.cfg(*rows, **more), pretrained or small(), reward=reward)

    def run(self, name, resume=False, reward=number, every=2, callbacks=(), **data):
        "A whole run on bytes."
        if not (base := self.path / "base").exists():
            export(small(ByteTokenizer()).model, ByteTokenizer(), base)
        cfg = self.cfg([{"prompt": text} for text in ("a", "bc", "hello there")], **data)
        steps = {"checkpoint_interval": every, "validation_interval": 3, "logging_interval": 1}
        logging = cfg.logging.model_copy(update={"keep_last": 50,
                                                 "steps": cfg.logging.steps.model_copy(update=steps)})
        go_on = cfg.resume.model_copy(update={"checkpoint": "latest"}) if resume else cfg.resume
        cfg = cfg.model_copy(update={"name": name, "pretrained_model": str(base), "logging": logging,
                                     "resume": go_on})
        return ppo(cfg, self.runs, reward=reward, callbacks=callbacks)


def arrays(trainer): return [np.array(w) for _, w in tree_flatten(trainer.arrays())]
def same(a, b): return all(np.array_equal(x, y) for x, y in zip(arrays(a), arrays(b), strict=True))


class Killed(BaseException): pass


def once(monkeypatch, owner, name, nth, error, late=False):
    "The nth call of a function ends in an error, before its work or (`late`) after it."
    calls, work = [], getattr(owner, name)
    def wrapped(*args, **kwargs):
        calls.append(name)
        if late: result = work(*args, **kwargs)
        if len(calls) == nth: raise error
        return result if late else work(*args, **kwargs)
    monkeypatch.setattr(owner, name, wrapped)
    return calls


# ---- a step is atomic

PHASES = [("generate", 2), ("score", 2), ("make_rollout", 1), ("whiten", 2), ("minibatches", 1),
          ("minibatches", 6)]


@pytest.mark.parametrize("name, nth", PHASES)
def test_a_step_cut_short_goes_on_to_the_same_bits(name, nth, home, monkeypatch):
    "Ctrl-C in any phase, then step(): nobody sees a difference. Red if a phase is done twice, or its samples are drawn anew."
    calm, cut = home.trainer(), home.trainer()
    for _ in range(2): calm.step()
    once(monkeypatch, module, name, nth, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        while cut.steps_done < 2: cut.step()
    while cut.steps_done < 2: cut.step()
    assert same(calm, cut) and calm.rewards == cut.rewards and calm.guards.state() == cut.guards.state()
    assert calm.sampled.responses == cut.sampled.responses and calm.tokens == cut.tokens


@pytest.mark.parametrize("share", [0.75, 0.25])
def test_an_epoch_that_was_cut_short_is_judged_as_a_whole(share, home, monkeypatch):
    "`target_kl` above and below the mean of its two updates, but not above the second. Red if the mean forgets what was before the cut."
    look = home.trainer()
    phases = look.phases()
    while not look.now or len(look.now.updates) < 2: next(phases)
    calm, cut = (home.trainer(target_kl=share * look.now.updates[1]["approx_kl"]) for _ in range(2))
    calls = once(monkeypatch, cut, "_one_update", 2, KeyboardInterrupt())
    calm.step()
    with pytest.raises(KeyboardInterrupt): cut.step()
    cut.step()
    assert same(calm, cut) and (len(calls) == 3) == (share == 0.25)  # two updates, one of them tried twice


def test_ctrl_c_during_an_update_does_not_apply_it_twice(home, monkeypatch):
    "Python hears Ctrl-C when the compiled function returns: the weights are new by then, and the note of it is not there yet."
    calm, cut = home.trainer(), home.trainer()
    calm.step()
    calls = once(monkeypatch, cut, "update", 3, KeyboardInterrupt(), late=True)
    with pytest.raises(KeyboardInterrupt): cut.step()
    cut.step()
    assert len(calls) > 3 and same(calm, cut)


@pytest.mark.parametrize("name", ["log_probs", "policy_loss"])
def test_ctrl_c_while_a_function_is_compiled_loses_nothing(name, home, monkeypatch):
    "Compiling takes a large part of the first step, and of each with a new shape."
    calm, cut = home.trainer(), home.trainer()
    calm.step()
    once(monkeypatch, module, name, 1, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt): cut.step()
    cut.step()
    assert same(calm, cut)


@pytest.mark.long
@pytest.mark.parametrize("name, nth", [("generate", 6), ("minibatches", 24), ("_one_update", 50)])
def test_a_killed_run_ends_as_one_that_was_not(name, nth, home, monkeypatch):
    "Killed in the forecast's shadow, in a sample, in an update: the resumed run has the same bits, state and metrics."
    held_out = (
        {}
        if name == "generate"
        else {"validation_file": home.rows([{"prompt": "zz"}, {"prompt": "q"}], "held.jsonl")}
    )
    calm = home.run("calm", **held_out)
    with monkeypatch.context() as patch:
        once(patch, PPOTrainer if name == "_one_update" else module, name, nth, Killed())
        with pytest.raises(Killed): home.run("cut", **held_out)
    assert 0 < len(checkpoints(home.runs / "cut")) < len(checkpoints(calm))
    cut = home.run("cut", resume=True, **held_out)
    (a, was), (b, now) = (load_checkpoint(checkpoints(run)[-1]) for run in (calm, cut))
    assert all(mx.array_equal(x, y) for (_, x), (_, y) in zip(tree_flatten(a), tree_flatten(b), strict=True))
    assert was == now
    lines = [[{k: v for k, v in row.items() if k != "tokens_per_second"}
              for row in read_metrics(run) if "event" not in row] for run in (calm, cut)]
    assert lines[0] == lines[1]


def test_a_checkpoint_holds_what_the_guards_have_seen(home):
    "A guard that waits for five steps in a row must not wait for six because the run was resumed."
    def end(trainer, metrics):
        if metrics["step"] == 3: raise Killed
    with pytest.raises(Killed): home.run("cut", callbacks=[end], reward=lambda p, r: 1.0)
    [path] = checkpoints(home.runs / "cut")
    assert load_checkpoint(path)[1]["guards"]["consecutive"]["equal_rewards"] == 2


def test_a_step_that_a_guard_stops_is_not_saved(home):
    "A training that stopped because the policy broke leaves no checkpoint of the broken policy as its latest."
    with pytest.raises(UserError, match="learning_rate"):
        home.run("wild", every=1, hyper={"learning_rate": 5.0})
    assert not checkpoints(home.runs / "wild")


def test_a_reward_that_fails_loses_nothing(home, caplog):
    "What the reward needs may be gone for a minute; the steps before are whole, and it is said how to go on."
    done = []
    def gone(prompt, response):
        if len(done) == 2: raise OSError("the server is gone")
        return number(prompt, response)
    with pytest.raises(RewardError):
        home.run("gone", every=500, reward=gone, callbacks=[lambda t, m: done.append(m)])
    assert [path.name for path in checkpoints(home.runs / "gone")] == [
        "step_000002"
    ] and "step_000002. To resume" in caplog.text


def test_another_reward_counts_the_best_anew(home):
    "Validations by another reward cannot be compared with those before."
    held_out = {"validation_file": home.rows([{"prompt": "zz"}, {"prompt": "q"}], "held.jsonl")}
    def end(trainer, metrics):
        if metrics["step"] == 5: raise Killed
    with pytest.raises(Killed):
        home.run("cut", callbacks=[end], reward=lambda p, r: 100 + number(p, r), **held_out)
    assert read_metadata(home.run("cut", resume=True, **held_out))["best"]["val_reward"] < 50


def test_a_changed_configuration_turns_the_knob_and_a_turned_knob_stays(home):
    "Red if a resumed run forgets a knob, or if the YAML's new price does not reach the next step."
    def end(trainer, metrics):
        if metrics["step"] == 1: trainer.knobs.temperature = 0.9
        if metrics["step"] == 5: raise Killed
    with pytest.raises(Killed): home.run("cut", callbacks=[end])
    seen = []
    def look(trainer, metrics):
        seen.append((trainer.last_knobs["kl_coef"], trainer.last_knobs["temperature"]))
    run = home.run("cut", resume=True, kl_coef=2.5, callbacks=[look])
    assert {*seen} == {(2.5, 0.9)}
    assert [(row["name"], row["step"])
            for row in read_metrics(run)
            if row.get("event") == "knob"] == [("temperature", 1), ("kl_coef", 4)]


# ---- the forecast

def test_a_forecast_leaves_no_trace(home):
    "Red if a probe counts steps, feeds the guards, or leaves weights, the optimizer's memory or knobs changed."
    plain, asked = home.trainer(), home.trainer()
    for _ in range(2):
        forecast(asked)
        plain.step(), asked.step()
    assert same(plain, asked) and plain.state() == asked.state()


def test_a_forecast_that_is_interrupted_leaves_no_trace(home):
    "Ctrl-C, or a reward that fails in the second probe: the trainer stands as it stood."
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

def test_a_warning_does_not_disown_later_steps(home):
    "\"The last good checkpoint\" of a training that ends much later is not the one before a harmless warning."
    trainer = home.trainer([{"prompt": ""}],
                           reward=lambda p, r: 1.0 if trainer.steps_done < 3 else count_a(p, r),
                           hyper={"iters": 8})
    for _ in range(8): trainer.step()
    assert trainer.last_good() == 8


def test_a_step_that_is_not_finite_is_no_explosion():
    "Such steps are skipped and counted; the guard's cause and remedy would be wrong. Red if what is not near is taken to be far."
    one, true = mx.array([[0.0]]), mx.array([[True]])
    _, count, seen = policy_loss(mx.array([[mx.nan]]), one, one, true, 0.2)
    metrics = dict.fromkeys(("reward", "reward_std", "kl", "entropy", "eos_fraction", "response_length"), 1.0)
    assert Guards().check({**metrics, **{key: (value / count).item() for key, value in seen.items()}},
                          {"kl_coef": 0.1}) == []


def test_the_report_of_a_skipped_update_tells_the_truth(home, monkeypatch, caplog):
    "The other updates of the step have changed the weights."
    trainer, calls = home.trainer(), []
    work, before = trainer.update, arrays(trainer)
    def broken(batches, rate):
        calls.append(rate)
        if len(calls) != 2: return work(batches, rate)
        held = {name: dict(tree_flatten(tree)) for name, tree in trainer.arrays().items()}
        loss, count, norm, _, means = work(batches, rate)
        for name, tree in trainer.checkpoint_trees().items(): assign_arrays(tree, held[name])
        return mx.array(float("inf")), count, norm, mx.array(False), means
    monkeypatch.setattr(trainer, "update", broken)
    trainer.step()
    assert not all(np.array_equal(a, b) for a, b in zip(before, arrays(trainer), strict=True))
    assert "weights unchanged" not in caplog.text and "of which 1 were skipped" in caplog.text


# ---- knobs

@pytest.mark.parametrize("name, value", [("kl_coef", 2.0), ("clip_range", 0.001), ("temperature", 0.4), ("target_kl", 1e-6)])
def test_a_knob_is_as_good_as_the_configuration(name, value, home):
    "Turned after everything was compiled, it is in the very next step, to the same bits. Red if a number is baked into compiled code."
    written, turned, plain = home.trainer(**{name: value}), home.trainer(), home.trainer()
    forecast(turned)                                                      # compiles
    setattr(turned.knobs, name, value)
    for trainer in (written, turned, plain): trainer.step(), trainer.step()
    assert same(written, turned) and not same(turned, plain)


@pytest.mark.parametrize("name, value", [("temperature", 0.0), ("temperature", -1.0), ("clip_range", -0.1), ("kl_coef", -1.0)])
def test_a_knob_knows_its_range(name, value, home):
    "A temperature of 0 divides by zero, and each step from then on is NaN."
    with pytest.raises(ValueError, match=name): setattr(home.trainer().knobs, name, value)


# ---- mathematics

def test_small_minibatches_together_are_the_large_one(home):
    "Unequal numbers of tokens, a smaller last part: the update is that of all rows at once. Red if a mean of means is taken."
    made = []
    for size, together in ((8, 1), (4, 2), (3, 3)):
        made.append(home.trainer(hyper={"gradient_accumulation_steps": together}, ppo_mini_batch_size=size))
        made[-1].step()
    assert made[0].rollout.response_mask.sum(axis=1).max() > made[0].rollout.response_mask.sum(axis=1).min()
    for other in made[1:]:
        assert max(np.abs(a - b).max() for a, b in zip(arrays(made[0]), arrays(other), strict=True)) < 1e-5


def test_checkpointed_blocks_change_no_bit(home):
    "Sampling with a cache, reading and updating. Red if a remembered block forgets the cache."
    plain, thrifty = home.trainer(), home.trainer(system={"gradient_checkpointing": True})
    for trainer in (plain, thrifty): trainer.step()
    assert same(plain, thrifty)


def test_log_probabilities_in_chunks_are_those_at_once():
    "Values and gradients over a vocabulary that needs several chunks. Red if a chunk loses its gradient, or the temperature."
    rng = np.random.default_rng(0)
    h, w = mx.array(rng.normal(size=(3, 70, 8)), mx.float32), mx.array(rng.normal(size=(5000, 8)), mx.float32)
    t = mx.array(rng.integers(0, 5000, (3, 70)), mx.int32)
    g = mx.array(rng.normal(size=(2, 3, 70)), mx.float32)
    def chunked(h, w): return sum((x * y).sum() for x, y in zip(head_logprobs(h, w, t, 0.7), g))
    def at_once(h, w):
        logp = (z := h @ w.T / 0.7) - mx.logsumexp(z, axis=-1, keepdims=True)
        return (mx.take_along_axis(logp, t[..., None],
                                   axis=-1)[..., 0] * g[0] - (mx.exp(logp) * logp).sum(axis=-1) * g[1]).sum()
    (a, da), (b, db) = (mx.compile(mx.value_and_grad(f, argnums=(0, 1)))(h, w) for f in (chunked, at_once))
    assert abs(a.item() - b.item()) < 1e-2 and all(mx.abs(x - y).max().item() < 1e-3 for x, y in zip(da, db))


def test_a_log_ratio_of_rows_is_the_log_ratio(home):
    "`row_logratio` says how much likelier the model finds the rows than the reference does, however a KL is estimated."
    rows = [{"prompt": "ab", "completion": said, "reward": said.count("a")} for said in ("a", "b", "aab")]
    trainer = home.trainer(rows, reward=None, kl_estimator="k3")
    for _ in range(3): metrics = trainer.step()
    ratio = np.array((trainer.rollout.logp - trainer.rollout.ref_logp).sum(axis=1)).mean()
    assert abs(metrics["row_logratio"] - ratio) < 1e-5


def test_few_widths_are_compiled(home):
    "Each width of responses is compiled anew; from 1 to 24 tokens the grid has 1 to 4, 8, 12, 16 and 32."
    trainer = home.trainer([{"prompt": "ab"}], response_length=24,
                           hyper={"batch_size": 2, "iters": 30, "learning_rate": 1e-9}, ppo_epochs=1)
    assert {(trainer.step(), trainer.rollout.response_mask.shape[1])[1]
            for _ in range(16)} <= {1, 2, 3, 4, 8, 12, 16, 32}


# ---- validation

def test_validation_is_what_is_said_about_all_held_out_prompts(home):
    "Five prompts in batches of two. Red if a smaller last batch weighs as much as the others."
    held_out = {"validation_file": home.rows([{"prompt": p} for p in ("a", "b", "cde", "e", "f")],
                                             "held.jsonl")}
    trainer = home.trainer(hyper={"batch_size": 2}, **held_out)
    for _ in range(3): trainer.step()
    before, measured = arrays(trainer), trainer.evaluate()
    sampled = trainer.sample(trainer.held_out, np.arange(5), trainer.last_knobs, -1)
    rollout, seen = trainer.score_samples(sampled, trainer.last_knobs)
    errors = np.array(mx.square(rollout.values - rollout.returns))[np.array(rollout.response_mask)]
    wanted = {"val_reward": sampled.scores.mean(), "val_kl": seen["kl"],
              "val_loss": 0.1 * 0.5 * errors.mean()}
    assert measured.keys() == wanted.keys() and all(abs(measured[key] - wanted[key]) < 1e-6 for key in wanted)
    assert measured == trainer.evaluate() and all(np.array_equal(a, b)
                                                  for a, b in zip(before, arrays(trainer), strict=True))


def test_equal_held_out_prompts_get_answers_of_their_own(home):
    "32 times the same prompt is a mean of 32 answers, whatever the batch size."
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


@pytest.mark.parametrize("answer", [[10**400, 1], Attached()], ids=["a huge integer", "a tensor with a gradient"])
def test_whatever_a_reward_returns_is_told_in_a_sentence(answer):
    "Red as long as a traceback comes out of NumPy."
    with pytest.raises(RewardError, match="Wrong"): score(Wrong(answer), ["a", "b"], ["c", "d"])


def test_texts_are_no_rewards():
    "A column that was read from a CSV file is a mistake, in rows and here alike."
    with pytest.raises(RewardError, match="not numbers"): score(Wrong(["1", "2"]), ["a", "b"], ["c", "d"])


def test_a_reward_of_reasonable_size_can_be_learned_from(home):
    "A reward is either refused with a sentence, or its steps are finite."
    trainer = home.trainer(reward=lambda p, r: 1e25 * r.count("a"))
    try: trainer.step()
    except RewardError: return
    assert trainer.skipped == 0


def test_a_reward_that_returns_nothing_is_to_blame(home):
    "A function without a return: its name, what it gave, and no line of somebody else's file."
    with pytest.raises(RewardError) as caught: home.trainer(reward=lambda p, r: None).step()
    assert "core.py" not in str(caught.value)


# ---- rows

def test_responses_of_rows_are_cut_where_the_last_answer_begins(home):
    "Several answers: the earlier ones are part of the prompt. With a chat template, with a format, and for a tokenizer without bos."
    def says(role, text): return {"role": role, "content": text}
    talk = [says("user", "q"), says("assistant", "early"), says("user", "p <eos>"), says("assistant", "late")]
    rows = [{"messages": talk, "reward": 1.0}, {"messages": talk[2:], "reward": 0.0}]
    folder = home.path / "tok"
    ByteTokenizer().save(folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<bos>{{ m.role }}:{{ m.content }}{% if m.role == 'assistant' %}<eos>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<bos>assistant:{% endif %}")
    for tok, fmt in ((HFTokenizer(folder), PromptFormat(prompt_format=None)), (ByteTokenizer(), None)):
        theirs = home.trainer(rows, reward=None, pretrained=small(tok)._replace(format=fmt))
        ours = home.trainer(rows, pretrained=small(tok)._replace(format=fmt))
        assert theirs.data.prompts == ours.data.prompts and "early" in tok.decode(ours.data.prompts[0])
        assert [tok.decode(r) for r in theirs.data.responses] == ["late"] * 2 and all(
            r[-1] == tok.eos_id for r in theirs.data.responses
        )
        theirs.step(), ours.step()
        assert {*theirs.sampled.response_texts} == {"late"}


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "huggingface"])
def test_what_is_asked_is_what_was_taught(kind, home):
    "The prompt to be answered is the prompt of the row with an answer, in tokens. Red if a response changes how its prompt is cut."
    row = {"instruction": "the old man ", "response": " counts", "reward": 1}
    fmt = PromptFormat()
    tok = tokenizer(kind)
    asked = encode_pieces(tok, [ask_pieces(fmt, tok, row)])[0].ids
    trainer = home.trainer([row], reward=None, pretrained=small(tok))
    assert trainer.data.prompts == [asked]
    trainer.step()
    assert trainer.sampled.response_texts[0].strip() == "counts"


def test_prompts_that_fill_the_context(home):
    "One token more is a sentence with file and line; exactly full is fine, so are responses of one token and a batch of one."
    full = {"prompt": "abcabc"}                                           # 7 tokens with the one that begins
    home.trainer([full], response_length=9, preprocessing={"max_context_size": 16}).step()
    with pytest.raises(UserError, match="rows.jsonl, line 1.*response_length"):
        home.trainer([full], response_length=10, preprocessing={"max_context_size": 16})
    metrics = home.trainer([full], response_length=1, hyper={"batch_size": 1}, ppo_mini_batch_size=100).step()
    assert metrics["response_length"] == 1 and metrics["tokens"] == 1


def test_a_bad_first_row_can_be_skipped(home):
    "A first row without a response is as bad as a later one."
    good = [{"prompt": "ab", "completion": said, "reward": 1.0} for said in "ab"]
    assert len(home.trainer([{"prompt": "ab", "reward": 1.0}, *good], reward=None,
                            on_bad_row="skip").data) == 2


def test_two_answers_in_a_row_are_two(home):
    "A question of no tokens: the response is the last answer, and ends once."
    talk = [{"role": role, "content": text}
            for role, text in (("user", "q"), ("assistant", "a"), ("user", ""), ("assistant", "b"))]
    rows = [{"messages": talk, "reward": 1.0}]
    trainer = home.trainer(rows, reward=None, pretrained=small(ByteTokenizer()),
                           prompt_format="{instruction}")
    assert trainer.data.responses == [[ord("b"), ByteTokenizer().eos_id]]


MESSAGES = PromptFormat(input_field="messages", output_field="messages")


@pytest.mark.parametrize("row", [{"messages": [{"role": "user", "content": "a"}], "tools": [1]}, {"messages": "hello"}])
def test_conversations_are_checked_as_for_fine_tuning(row):
    "Tools that are not told of, and a text where a conversation should be."
    with pytest.raises(UserError): ask_pieces(MESSAGES, tokenizer("bytes"), row)


def test_the_prompt_of_a_conversation_in_two_columns():
    "What stands before the last response of a row includes the turns of the second column."
    def says(role, text): return {"role": role, "content": text}
    row = {"prompt": [says("user", "q")], "completion": [says("assistant", "early"), says("user", "p"),
                                                         says("assistant", "late")]}
    fmt, tok = PromptFormat(input_field="prompt", output_field="completion"), tokenizer("bytes")
    assert "early" in tok.decode(encode_pieces(tok, [ask_pieces(fmt, tok, row)])[0].ids)


def test_unwrapping_takes_only_what_was_put_around():
    "The response stands last in this format; nothing is behind it."
    assert (
        PromptFormat(response_format="{instruction}: {response}")
        .parse_response("q: the answer is: ")
        .endswith("the answer is: ")
    )


def test_a_model_with_adapters_is_told_or_merged(home):
    "A model that was fine-tuned with LoRA in this very notebook."
    start = small()
    try: home.trainer(pretrained=start._replace(model=apply_lora(start.model, LoRAConfig(rank=2)))).step()
    except UserError: pass
