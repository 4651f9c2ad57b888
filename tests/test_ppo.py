"PPO proven, piece by piece: each check is also made on a program with the known mistake in it, and must fail there."
import math

import pytest
from common import forall
from hypothesis import strategies as st
from toys import planted, task, tiny

import mlx_pretrain  # noqa: F401, I001 (before MLX)

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_pretrain import generate as sampling
from mlx_pretrain import ppo
from mlx_pretrain.prompts import pad_prompt_response
from mlx_pretrain.model import KVCache, ScalarLlama
from mlx_pretrain.ppo import (
    ActorCritic, Minibatch, Rollout, gae, kl_estimate, log_probs, minibatches, policy_loss, ppo_loss,
    token_rewards, value_loss, whiten)

PROMPTS = ("", "a", "abc", "hgfedcba")
count = lambda prompt, response: response.count("a") / 6  # noqa: E731


def trainer_on_padded_prompts(**more):
    return task(count, prompts=PROMPTS, batch=16, response_length=6, temperature=0.7, pretrained=tiny(loud=5),
                **more)


# 1. What was sampled is what is scored, and what is scored is what is updated

def drawn_again(trainer, knobs):
    "Each token of the last samples, drawn once more with the same keys, from one pass over prompt and response of its row alone."
    keys = sampling.row_keys(trainer.sampled.prompts, trainer.seed, trainer.steps_done - 1)
    same = True
    for prompt, response, key in zip(trainer.sampled.prompts, trainer.sampled.responses, keys):
        logits = trainer.before(mx.array([prompt + response]))[0, len(prompt) - 1:]
        for t, token in enumerate(response):
            key, now = mx.random.split(key)
            same &= sampling.sample(logits[t:t + 1], now[None], knobs["temperature"]).item() == token
    return same


def scored(trainer, knobs):
    "Log-probabilities of the last samples, each row alone, in the plainest way; as far as they are off from those in the rollout."
    off, mask = 0.0, np.array(trainer.rollout.response_mask)
    for i, (prompt, response) in enumerate(zip(trainer.sampled.prompts, trainer.sampled.responses)):
        logits = np.array(trainer.before(mx.array([prompt + response]))[0, len(prompt) - 1:-1],
                          np.float64) / knobs["temperature"]
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        got = np.array(trainer.rollout.logp[i])[mask[i]]
        off = max(off, np.abs(logp[np.arange(len(response)), response] - got).max())
    return off


def sound(trainer, steps=2):
    "Are samples, scores and the first update of each step of one mind?"
    fine = True
    for step in range(steps):
        trainer.before = ppo.llama_from_weights(trainer.model.args, dict(tree_flatten(trainer.model.parameters())))
        phases = trainer.phases()
        while next(phases) != "update": pass
        first, knobs = trainer.now.updates[0], trainer.now.knobs
        fine &= (
            first["approx_kl"] <= 1e-10
            and first["clip_fraction"] == 0
            and math.sqrt(2 * first["approx_kl"]) <= 1e-5
        )
        fine &= step > 0 or trainer.now.seen["kl"] == 0
        for _ in phases: pass
        fine &= drawn_again(trainer, knobs) and scored(trainer, knobs) < 1e-5
    return fine


def test_samples_scores_and_updates_are_of_one_mind():
    "Ratio 1, nothing clipped, KL exactly 0 before the first update; each token is drawn again from what is scored, with the same key."
    assert sound(trainer_on_padded_prompts())


class Late(KVCache):
    "A cache that does not take in the newest key: it gives the one before once more."
    def append(self, k, v):
        start = self.length
        keys, values = super().append(k, v)
        return (keys if start == 0 else mx.concatenate([keys[:, :, :-1], keys[:, :, -2:-1]], axis=2)), values


MINDS = {
    "temperature only in sampling": lambda m: m.setattr(
        ppo, "log_probs", planted(log_probs, ", temperature)\n", ")\n")
    ),
    "temperature not in the update": lambda m: m.setattr(
        ppo, "ppo_loss", planted(ppo_loss, "length, batch.temperature", "length")
    ),
    "positions count the padding": lambda m: m.setattr(
        ppo, "log_probs", planted(log_probs, "pad=pad", "pad=mx.zeros_like(pad)")
    ),
    "padding is looked at": lambda m: m.setattr(ppo, "log_probs", planted(log_probs, ", pad=pad", "")),
    "one token late": lambda m: m.setattr(
        ppo, "log_probs", planted(log_probs, "[:, start - 1:]", "[:, start - 2:-1]")
    ),
    "a stale cache": lambda m: m.setattr("mlx_pretrain.model.KVCache", Late),
}


@pytest.mark.parametrize("mistake", MINDS)
def test_a_mind_divided_is_seen(mistake, monkeypatch):
    MINDS[mistake](monkeypatch)
    assert not sound(trainer_on_padded_prompts())


# 2. Padding changes nothing

def batch_of(pretrained, prompts, responses, extra=0):
    tokens, pad, mask = pad_prompt_response(prompts, responses, 0)
    tokens, pad, mask = np.pad(tokens, [(0, 0), (extra, extra)],
                               constant_values=4), pad + extra, np.pad(mask, [(0, 0), (0, extra)])
    return mx.array(tokens), mx.array(pad), mx.array(mask)


def numbers(pretrained, critic, prompts, responses, extra=0):
    "Log-probabilities and values of each row, and the gradient of both losses."
    tokens, pad, mask = batch_of(pretrained, prompts, responses, extra)
    R, rng = mask.shape[1], np.random.default_rng(0)
    noise = [{(tuple(p), tuple(r)): rng.normal(size=len(r)) for p, r in zip(ROWS, SAID)} for _ in range(3)]
    def spread(of):
        rows = [np.pad(of[tuple(p), tuple(r)], (0, R - len(r)), constant_values=9)
                for p, r in zip(prompts, responses)]
        return mx.array(np.stack(rows), mx.float32)

    old, adv, ret = (spread(of) for of in noise)
    logp, _ = ppo.log_probs(pretrained.model, tokens, pad, R, 0.7)
    values = ppo.critic_values(critic, tokens, pad, R)
    rollout = Rollout(tokens, pad, mask, logp + 0.1 * old, logp, values, adv, adv, ret)
    batch, loss = Minibatch(rollout, mx.array(0.2), mx.array(0.7)), ppo.ppo_loss(0.5, 10.0)
    both = ActorCritic(pretrained.model, critic)
    total, grads = nn.value_and_grad(both, lambda model: loss(model, batch)[0])(both)
    rows = [(np.array(logp[i])[:len(r)], np.array(values[i])[:len(r)]) for i, r in enumerate(responses)]
    return rows, {"loss": np.array(total), **{name: np.array(g) for name, g in tree_flatten(grads)}}


ROWS, SAID = [[1], [1, 3, 4, 5], [1, 6]], [[3, 3, 2], [5, 4, 3, 6, 7, 2], [2]]


def padding_is_nothing():
    pretrained = tiny(layers=2, kv_heads=1, seed=3)
    critic = ScalarLlama.from_llama(pretrained.model)
    critic.score.weight = mx.random.normal(critic.score.weight.shape, key=mx.random.key(1))
    rows, grads = numbers(pretrained, critic, ROWS, SAID)
    wide, wide_grads = numbers(pretrained, critic, ROWS, SAID, extra=5)
    alone = [numbers(pretrained, critic, [p], [r]) for p, r in zip(ROWS, SAID)]
    pairs = [(a, b) for i in range(3) for other in (wide[i], alone[i][0][0]) for a, b in zip(rows[i], other)]
    pairs += [(g, wide_grads[name]) for name, g in grads.items()]
    pairs += [(g, sum(one[1][name] for one in alone)) for name, g in grads.items()]
    assert all(np.abs(g).max() > 0 for g in grads.values())
    return all(np.abs(a - b).max() < 1e-5 * max(1, np.abs(a).max()) for a, b in pairs)


def test_a_row_alone_is_the_row_in_a_batch():
    "Log-probabilities, values and gradients, with padding, without, and with more of it."
    assert padding_is_nothing()


@pytest.mark.parametrize("mistake", ["positions", "looks", "values", "mask"])
def test_padding_that_matters_is_seen(mistake, monkeypatch):
    wrong = {"positions": (ppo, "log_probs", planted(log_probs, "pad=pad", "pad=mx.zeros_like(pad)")),
             "looks": (ppo, "log_probs", planted(log_probs, ", pad=pad", "")),
             "values": (ppo, "critic_values", planted(ppo.critic_values, ", pad)", ")")),
             "mask": (ppo, "policy_loss", planted(policy_loss, "mx.where(mask, mx.maximum",
                                                  "mx.where(mask | True, mx.maximum"))}
    monkeypatch.setattr(*wrong[mistake])
    assert not padding_is_nothing()


@forall(30, lengths=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12)), min_size=1, max_size=9), size=st.integers(1, 9))
def test_minibatches_hold_each_row_once_without_columns_of_padding(lengths, size):
    "Whatever is cut off is padding in all rows of the part."
    prompts, responses = [[5] * p for p, _ in lengths], [[6 + i] * r for i, (_, r) in enumerate(lengths)]
    tokens, pad, mask = pad_prompt_response(prompts, responses, 0)
    numbers = np.where(mask, np.arange(mask.size).reshape(mask.shape) + 1.0, 0)
    rollout = Rollout(*map(mx.array, (tokens, pad, mask, *[numbers] * 6)))
    parts = minibatches(rollout, np.random.default_rng(0).permutation(len(lengths)), size,
                        {"clip_range": 0.2, "temperature": 1.0})
    seen = []
    for part in parts:
        t, p, m = (np.array(x) for x in part.rows[:3])
        P = t.shape[1] - m.shape[1]
        for row in range(len(t)):
            said = t[row, P:][m[row]].tolist()
            i = said[0] - 6
            assert (t[row, p[row]:P].tolist(), said, len(said)) == (prompts[i], responses[i], m[row].sum())
            assert np.array_equal(np.array(part.rows.returns[row])[m[row]], numbers[i][mask[i]])
            seen.append(i)
    assert sorted(seen) == [*range(len(lengths))] and all(len(part.rows.pad) <= size for part in parts)


# 3. Advantages

def gae_by_hand(rewards, values, lengths, gamma, lam):
    "The definition: a discounted sum over all later surprises, row by row."
    out = np.zeros(rewards.shape)
    for b, n in enumerate(lengths):
        delta = [rewards[b, t] + gamma * (values[b, t + 1] if t + 1 < n else 0) - values[b, t]
                 for t in range(n)]
        for t in range(n): out[b, t] = sum((gamma * lam) ** (s - t) * delta[s] for s in range(t, n))
    return out


def advantages_are_right(compute, seed, gamma, lam):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 9, size=5)
    mask = np.arange(9) < lengths[:, None]
    rewards, values = (np.where(mask, rng.normal(size=mask.shape), 1e4 * rng.normal(size=mask.shape))
                       for _ in range(2))
    advantages, returns = compute(rewards, values, mask, gamma, lam)
    wanted = gae_by_hand(rewards, values, lengths, gamma, lam)
    fine = (
        np.abs(advantages - wanted).max() < 1e-4
        and np.abs(returns - np.where(mask, wanted + values, 0)).max() < 1e-4
    )
    if (gamma, lam) == (1, 1):
        fine &= np.abs(returns[mask] - np.where(mask, rewards,
                                                0)[:, ::-1].cumsum(1)[:, ::-1][mask]).max() < 1e-4
    return fine


@forall(60, seed=st.integers(0, 10_000), gamma=st.sampled_from([1.0, 0.9]), lam=st.sampled_from([0.0, 0.5, 0.95, 1.0]))
def test_advantages_are_the_sum_of_later_surprises(seed, gamma, lam):
    assert advantages_are_right(gae, seed, gamma, lam)


@pytest.mark.parametrize(("right", "wrong"), {
    "believes values past the end": ("np.where(mask[:, t], values[:, t], 0)", "values[:, t]"),
    "carries surprises past the end": ("np.where(mask[:, t], surprise + gamma * lam * after, 0)", "surprise + gamma * lam * after"),
    "forgets gamma": ("gamma * lam * after", "lam * after"), "the value of this token": ("gamma * expected - values", "expected - values"),
    "returns without values": ("np.where(mask, advantages + values, 0)", "np.where(mask, advantages, 0)")}.values())
def test_wrong_advantages_are_seen(right, wrong):
    compute = planted(gae, right, wrong)
    assert not all(advantages_are_right(compute, seed, 0.9, 0.5) for seed in range(5))


def rewards_are_right(compute):
    "The score is on the last token, the price on each, nothing in the padding; summed, a row earns its score less its price."
    rng, lengths = np.random.default_rng(0), np.array([6, 1, 3])
    mask, scores = np.arange(6) < lengths[:, None], rng.normal(size=3)
    logp, ref = (np.where(mask, -rng.random((3, 6)), np.nan) for _ in range(2))
    got = compute(scores, logp, ref, mask, 0.3)
    wanted = np.zeros((3, 6))
    for b, n in enumerate(lengths):
        for t in range(n): wanted[b, t] = -0.3 * (logp[b, t] - ref[b, t]) + (scores[b] if t == n - 1 else 0)
    return np.isfinite(got).all() and np.abs(got - wanted).max() < 1e-6


def test_rewards_stand_where_they_are_earned(): assert rewards_are_right(token_rewards)


@pytest.mark.parametrize(("right", "wrong"), [
    ("mask.sum(axis=1) - 1", "-1"), ("mask.sum(axis=1) - 1", "mask.sum(axis=1) % mask.shape[1]"), ("-kl_coef", "kl_coef"),
    ("np.where(mask, -kl_coef * (logp - ref_logp), 0)", "-kl_coef * (logp - ref_logp)"), ("(logp - ref_logp)", "(ref_logp - logp)"),
    ("+= scores", "= scores")])
def test_rewards_in_a_wrong_place_are_seen(right, wrong):
    assert not rewards_are_right(planted(token_rewards, right, wrong))


# 4. Whitening

def white(compute):
    rng = np.random.default_rng(0)
    mask = rng.random((20, 9)) < 0.6
    x = np.where(mask, 5 + 3 * rng.normal(size=mask.shape), 1e6)
    y, kept = compute(x, mask), compute(x, mask, shift_mean=False)
    fine = (
        abs(y[mask].mean()) < 1e-5
        and abs(y[mask].var() - 1) < 1e-4
        and not y[~mask].any()
        and not kept[~mask].any()
    )
    return fine and abs(kept[mask].mean() - x[mask].mean()) < 1e-4 and abs(kept[mask].var() - 1) < 1e-4


def test_white_is_mean_0_and_variance_1(): assert white(whiten)


@pytest.mark.parametrize(("right", "wrong"), [
    ("(0 if shift_mean else mean)", "mean"), ("(0 if shift_mean else mean)", "(mean if shift_mean else 0)"), ("x[mask]", "x"),
    ("math.sqrt(kept.var() + 1e-8)", "kept.var()"), ("np.where(mask, (x", "np.where(mask | True, (x")])
def test_grey_is_seen(right, wrong): assert not white(planted(whiten, right, wrong))


# 5. The gradient

def gradient_is_classic(make_loss):
    "At ratio 1: advantage times the gradient of the log-probability, from an independent computation; every leaf has one."
    pretrained, rng = tiny(layers=2, seed=1), np.random.default_rng(0)
    policy, critic = pretrained.model, ScalarLlama.from_llama(pretrained.model)
    critic.score.weight = mx.random.normal(critic.score.weight.shape, key=mx.random.key(1))
    tokens, pad, mask = batch_of(pretrained, ROWS, SAID)
    adv = rng.normal(size=mask.shape)
    logp, _ = log_probs(policy, tokens, pad, mask.shape[1])
    zero, values = mx.zeros(mask.shape), ppo.critic_values(critic, tokens, pad, mask.shape[1])
    rollout = Rollout(tokens, pad, mask, logp, logp, values, zero, mx.array(adv, mx.float32), values + 1)
    both, batch = ActorCritic(policy, critic), Minibatch(rollout, mx.array(0.2), mx.array(1.0))
    loss = make_loss(1.0, 10.0)
    got = dict(tree_flatten(nn.value_and_grad(both, lambda model: loss(model, batch)[0])(both)[1]))

    def classic(policy):
        total = 0.0
        for i, (prompt, response) in enumerate(zip(ROWS, SAID)):
            z = policy(mx.array([prompt + response]))[0]
            for t, token in enumerate(response):
                at = z[len(prompt) + t - 1]
                total = total - float(adv[i, t]) * (at[token] - mx.logsumexp(at))
        return total
    wanted = dict(tree_flatten(nn.value_and_grad(policy, classic)(policy)[1]))
    same = all(np.abs(np.array(got[f"policy.{name}"]) - np.array(g)).max() < 1e-5
               for name, g in wanted.items())
    return same and all(mx.abs(g).max().item() > 0 for g in got.values())


def test_at_ratio_1_the_gradient_is_the_classic_one(): assert gradient_is_classic(ppo_loss)


@pytest.mark.parametrize(("right", "wrong"), {
    "scored outside of what is differentiated": ("logp, rows.logp, rows.advantages", "mx.stop_gradient(logp), rows.logp, rows.advantages"),
    "values outside": ("value_loss(values, rows", "value_loss(mx.stop_gradient(values), rows"),
    "old minus new": ("logp, rows.logp, rows.adv", "rows.logp, logp, rows.adv"),
    "returns instead of advantages": ("rows.advantages", "rows.returns")}.values())
def test_a_dead_gradient_is_seen(right, wrong):
    assert not gradient_is_classic(planted(ppo_loss, right, wrong))


# 6. The losses

def losses_are_right(policy, value, kl, seed):
    "Against a transcription of the published formulas, with NaN in the padding."
    rng = np.random.default_rng(seed)
    mask = np.arange(7) < rng.integers(1, 8, size=4)[:, None]
    new, old, adv, v, v_old, ret = (np.where(mask, rng.normal(size=mask.shape), np.nan) for _ in range(6))
    clip, vclip = rng.uniform(0.05, 0.5), rng.uniform(0.05, 1)
    r, a = np.exp(new - old)[mask], adv[mask]
    # Schulman et al. 2017: E[min(r A, clip(r) A)]; the values: max((v − R)², (v_old + clip(v − v_old) − R)²) / 2
    wanted_policy = -np.minimum(r * a, np.clip(r, 1 - clip, 1 + clip) * a).sum()
    wanted_value = 0.5 * np.maximum((v - ret) ** 2,
                                    (v_old + np.clip(v - v_old, -vclip, vclip) - ret) ** 2)[mask].sum()
    arrays = [mx.array(x, dtype=mx.float32) for x in (new, old, adv, v, v_old, ret)]
    m = mx.array(mask)
    loss, count, seen = policy(*arrays[:3], m, clip)
    vloss, vcount = value(*arrays[3:], m, vclip)
    held = ((a > 0) & (r > 1 + clip)) | ((a < 0) & (r < 1 - clip))
    fine = (
        abs(loss.item() - wanted_policy) < 1e-3 * max(1, abs(wanted_policy))
        and abs(vloss.item() - wanted_value) < 1e-3
    )
    fine &= count.item() == vcount.item() == mask.sum() and seen["clip_fraction"].item() == held.sum()
    fine &= abs(seen["approx_kl"].item() - 0.5 * ((new - old)[mask] ** 2).sum()) < 1e-3
    p, q = (np.exp(x) / np.exp(x).sum() for x in rng.normal(size=(2, 6)))
    exact = (p * np.log(p / q)).sum()
    for kind in ("k1", "k3"): fine &= abs((p * kl(np.log(p), np.log(q), kind)).sum() - exact) < 1e-12
    return bool(fine and (kl(np.log(p), np.log(q), "k3") >= 0).all())


@forall(60, seed=st.integers(0, 10_000))
def test_losses_are_the_published_ones(seed):
    assert losses_are_right(policy_loss, value_loss, kl_estimate, seed)


@pytest.mark.parametrize(("function", "right", "wrong"), [
    (policy_loss, "mx.maximum(free, clipped)", "mx.minimum(free, clipped)"), (policy_loss, "mx.maximum(free, clipped)", "free"),
    (policy_loss, "mx.maximum(free, clipped)", "clipped"), (policy_loss, "1 - clip_range", "1 / (1 + clip_range)"),
    (policy_loss, "mx.where(mask, mx.maximum", "mx.where(mask | True, mx.maximum"),
    (policy_loss, "return loss, mask.sum()", "return loss, mx.array(mask.size)"),
    (value_loss, "mx.maximum(mx.square(values - returns), mx.square(near - returns))", "mx.square(values - returns)"),
    (value_loss, "mx.maximum", "mx.minimum"), (value_loss, "0.5 * ", ""), (value_loss, "near - returns", "near - old_values"),
    (kl_estimate, "np.expm1(-ratio) + ratio", "np.expm1(ratio) - ratio"), (kl_estimate, "return ratio if", "return -ratio if")])
def test_other_losses_are_seen(function, right, wrong):
    functions = {f.__name__: f for f in (policy_loss, value_loss,
                                         kl_estimate)} | {function.__name__: planted(function, right, wrong)}
    assert not all(losses_are_right(*functions.values(), seed) for seed in range(10))


def test_k3_is_no_price():
    "Near the reference the push of k3 vanishes; that of k1 is the gradient of the KL. So the price is k1, whatever is reported."
    seen = {}
    for kind in ("k1", "k3"):
        trainer = task(count, response_length=6, batch=16, kl_coef=0.2, kl_estimator=kind)
        for _ in range(2): trainer.step()
        rollout = trainer.rollout
        price = np.array(-0.2 * (rollout.logp - rollout.ref_logp))
        scores = np.array(rollout.rewards) - np.where(np.array(rollout.response_mask), price, 0)
        assert np.allclose(scores.sum(axis=1), trainer.sampled.scores, atol=1e-5)
        seen[kind] = trainer.step()["kl"]
    assert seen["k1"] != seen["k3"] >= 0


def test_every_stop_token_ends_a_response():
    "A published model may have several; the template ends answers with one of them, and the model may use another."
    pretrained = tiny()
    b = 3 + pretrained.tokenizer.letters.index("b")
    pretrained.tokenizer._eos_ids = (2, b)
    trainer = task(lambda prompt, response: float(len(response)), pretrained=pretrained, response_length=12,
                   missing_eos_penalty=1.0)
    responses = trainer.sample(trainer.data, np.zeros(200, int), {"temperature": 1.0}, 0).responses
    assert {2, b} == {response[-1] for response in responses if len(response) < 12}
    assert not any({2, b} & {*response[:-1]} for response in responses)
    metrics = trainer.step()
    assert metrics["eos_fraction"] == np.mean([response[-1] in (2, b)
                                               for response in trainer.sampled.responses]) > 0.5
