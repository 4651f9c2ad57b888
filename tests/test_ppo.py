"PPO, piece by piece: each check is repeated on code with a known mistake planted in it, and must fail there."
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
from mlx_pretrain import ppo, rollout as rollouts
from mlx_pretrain.lora import llama_from_weights
from mlx_pretrain.model import KVCache, ScalarLlama
from mlx_pretrain.ppo import ActorCritic, gae, ppo_loss, token_rewards, value_loss
from mlx_pretrain.prompts import pad_prompt_response
from mlx_pretrain.rollout import (
    Minibatch, Rollout, critic_values, kl_estimate, log_probs, minibatches, policy_loss, whiten)

PROMPTS = ("", "a", "abc", "hgfedcba")


def count(prompt, response): return response.count("a") / 6


def trainer_on_padded_prompts(**more):
    return task(count, prompts=PROMPTS, batch=16, response_length=6, temperature=0.7, pretrained=tiny(loud=5),
                **more)


# 1. Sampling, scoring and the update agree on log-probabilities

def samples_reproduce(trainer, knobs):
    "Is each token of the last samples drawn again with the same key, from the logits of its row alone?"
    keys = sampling.row_keys(trainer.sampled.prompts, trainer.seed, trainer.steps_done - 1)
    same = True
    for prompt, response, key in zip(trainer.sampled.prompts, trainer.sampled.responses, keys):
        logits = trainer.before(mx.array([prompt + response]))[0, len(prompt) - 1:]
        for t, token in enumerate(response):
            key, token_key = mx.random.split(key)
            same &= sampling.sample(logits[t:t + 1], token_key[None], knobs["temperature"]).item() == token
    return same


def logprob_error(trainer, knobs):
    "Largest difference of the rollout's log-probabilities to those of each row alone, by NumPy."
    off, mask = 0.0, np.array(trainer.rollout.response_mask)
    for i, (prompt, response) in enumerate(zip(trainer.sampled.prompts, trainer.sampled.responses)):
        logits = np.array(trainer.before(mx.array([prompt + response]))[0, len(prompt) - 1:-1],
                          np.float64) / knobs["temperature"]
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        got = np.array(trainer.rollout.logp[i])[mask[i]]
        off = max(off, np.abs(logp[np.arange(len(response)), response] - got).max())
    return off


def agree(trainer, steps=2):
    "Do samples, scores and the first update of each step have the same log-probabilities?"
    ok = True
    for step in range(steps):
        weights = dict(tree_flatten(trainer.model.parameters()))
        trainer.before = llama_from_weights(trainer.model.args, weights)
        phases = trainer.phases()
        while next(phases) != "update": pass
        state = trainer.partial_step
        first, knobs = state.updates[0], state.knobs
        ok &= math.sqrt(2 * first["approx_kl"]) <= 1e-5 and first["clip_fraction"] == 0
        ok &= first["approx_kl"] <= 1e-10 and (step > 0 or state.metrics["kl"] == 0)
        for _ in phases: pass
        ok &= samples_reproduce(trainer, knobs) and logprob_error(trainer, knobs) < 1e-5
    return ok


def test_sampling_scoring_and_update_agree():
    "Before the first update ratio 1, nothing clipped, KL exactly 0; each token is drawn again with its key."
    assert agree(trainer_on_padded_prompts())


class StaleCache(KVCache):
    "A cache that repeats the second newest key in place of the newest."
    def append(self, k, v):
        start = self.length
        keys, values = super().append(k, v)
        return (keys if start == 0 else mx.concatenate([keys[:, :, :-1], keys[:, :, -2:-1]], axis=2)), values


def plant_in_log_probs(monkeypatch, right, wrong):
    "In the forward pass of the rollout and in the loss."
    for module in (rollouts, ppo): monkeypatch.setattr(module, "log_probs", planted(log_probs, right, wrong))


LOGPROB_MISTAKES = {
    "temperature only in sampling": (", temperature)\n", ")\n"),
    "positions count the padding": ("pad=pad", "pad=mx.zeros_like(pad)"),
    "padding is attended to": (", pad=pad", ""),
    "one token late": ("[:, start - 1:]", "[:, start - 2:-1]"),
}


@pytest.mark.parametrize("mistake", LOGPROB_MISTAKES)
def test_planted_logprob_mistakes_are_detected(mistake, monkeypatch):
    plant_in_log_probs(monkeypatch, *LOGPROB_MISTAKES[mistake])
    assert not agree(trainer_on_padded_prompts())


def test_a_temperature_missing_from_the_update_is_detected(monkeypatch):
    monkeypatch.setattr(ppo, "ppo_loss", planted(ppo_loss, "length, batch.temperature", "length"))
    assert not agree(trainer_on_padded_prompts())


def test_a_stale_cache_is_detected(monkeypatch):
    monkeypatch.setattr("mlx_pretrain.model.KVCache", StaleCache)
    assert not agree(trainer_on_padded_prompts())


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
    noise = [{(tuple(p), tuple(r)): rng.normal(size=len(r)) for p, r in zip(PROMPT_IDS, RESPONSE_IDS)}
             for _ in range(3)]
    def spread(of):
        rows = [np.pad(of[tuple(p), tuple(r)], (0, R - len(r)), constant_values=9)
                for p, r in zip(prompts, responses)]
        return mx.array(np.stack(rows), mx.float32)

    old, adv, ret = (spread(of) for of in noise)
    logp, _ = ppo.log_probs(pretrained.model, tokens, pad, R, 0.7)       # with the planted mistake, if any
    values = ppo.critic_values(critic, tokens, pad, R)
    rollout = Rollout(tokens, pad, mask, logp + 0.1 * old, logp, values, adv, adv, ret)
    batch, loss = Minibatch(rollout, mx.array(0.2), mx.array(0.7)), ppo.ppo_loss(0.5, 10.0)
    both = ActorCritic(pretrained.model, critic)
    total, grads = nn.value_and_grad(both, lambda model: loss(model, batch)[0])(both)
    rows = [(np.array(logp[i])[:len(r)], np.array(values[i])[:len(r)]) for i, r in enumerate(responses)]
    return rows, {"loss": np.array(total), **{name: np.array(g) for name, g in tree_flatten(grads)}}


PROMPT_IDS, RESPONSE_IDS = [[1], [1, 3, 4, 5], [1, 6]], [[3, 3, 2], [5, 4, 3, 6, 7, 2], [2]]


def padding_changes_nothing():
    pretrained = tiny(layers=2, kv_heads=1, seed=3)
    critic = ScalarLlama.from_llama(pretrained.model)
    critic.score.weight = mx.random.normal(critic.score.weight.shape, key=mx.random.key(1))
    rows, grads = numbers(pretrained, critic, PROMPT_IDS, RESPONSE_IDS)
    wide, wide_grads = numbers(pretrained, critic, PROMPT_IDS, RESPONSE_IDS, extra=5)
    alone = [numbers(pretrained, critic, [p], [r]) for p, r in zip(PROMPT_IDS, RESPONSE_IDS)]
    pairs = [(a, b) for i in range(3) for other in (wide[i], alone[i][0][0]) for a, b in zip(rows[i], other)]
    pairs += [(g, wide_grads[name]) for name, g in grads.items()]
    pairs += [(g, sum(row_grads[name] for _, row_grads in alone)) for name, g in grads.items()]
    assert all(np.abs(g).max() > 0 for g in grads.values())
    return all(np.abs(a - b).max() < 1e-5 * max(1, np.abs(a).max()) for a, b in pairs)


def test_a_row_alone_is_the_row_in_a_batch():
    "Log-probabilities, values and gradients, with padding, without, and with more of it."
    assert padding_changes_nothing()


@pytest.mark.parametrize(("function", "right", "wrong"), [
    (log_probs, "pad=pad", "pad=mx.zeros_like(pad)"),
    (log_probs, ", pad=pad", ""),
    (critic_values, ", pad)", ")"),
    (policy_loss, "mx.where(mask, mx.maximum", "mx.where(mask | True, mx.maximum")])
def test_padding_that_matters_is_detected(function, right, wrong, monkeypatch):
    monkeypatch.setattr(ppo, function.__name__, planted(function, right, wrong))
    assert not padding_changes_nothing()


LENGTHS = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12)), min_size=1, max_size=9)


@forall(30, lengths=LENGTHS, size=st.integers(1, 9))
def test_minibatches_hold_each_row_once_without_columns_of_padding(lengths, size):
    "Whatever is cut off is padding in all rows of the mini-batch."
    prompts, responses = [[5] * p for p, _ in lengths], [[6 + i] * r for i, (_, r) in enumerate(lengths)]
    tokens, pad, mask = pad_prompt_response(prompts, responses, 0)
    numbers = np.where(mask, np.arange(mask.size).reshape(mask.shape) + 1.0, 0)
    rollout = Rollout(*map(mx.array, (tokens, pad, mask, *[numbers] * 6)))
    parts = minibatches(rollout, np.random.default_rng(0).permutation(len(lengths)), size,
                        {"clip_range": 0.2, "temperature": 1.0})
    rows = []
    for part in parts:
        t, p, m = (np.array(x) for x in part.rows[:3])
        P = t.shape[1] - m.shape[1]
        for row in range(len(t)):
            response = t[row, P:][m[row]].tolist()
            i = response[0] - 6
            assert t[row, p[row]:P].tolist() == prompts[i]
            assert response == responses[i] and len(response) == m[row].sum()
            assert np.array_equal(np.array(part.rows.returns[row])[m[row]], numbers[i][mask[i]])
            rows.append(i)
    assert sorted(rows) == [*range(len(lengths))] and all(len(part.rows.pad) <= size for part in parts)


# 3. Advantages

def gae_by_definition(rewards, values, lengths, gamma, lam):
    "A discounted sum over all later TD errors, row by row."
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
    expected = gae_by_definition(rewards, values, lengths, gamma, lam)
    ok = np.abs(advantages - expected).max() < 1e-4
    ok &= np.abs(returns - np.where(mask, expected + values, 0)).max() < 1e-4
    if (gamma, lam) == (1, 1):
        to_go = np.where(mask, rewards, 0)[:, ::-1].cumsum(1)[:, ::-1]
        ok &= np.abs(returns[mask] - to_go[mask]).max() < 1e-4
    return ok


@forall(60, seed=st.integers(0, 10_000), gamma=st.sampled_from([1.0, 0.9]),
        lam=st.sampled_from([0.0, 0.5, 0.95, 1.0]))
def test_advantages_are_the_sum_of_later_td_errors(seed, gamma, lam):
    assert advantages_are_right(gae, seed, gamma, lam)


@pytest.mark.parametrize(("right", "wrong"), {
    "uses values of the padding": ("np.where(mask[:, t], values[:, t], 0)", "values[:, t]"),
    "carries TD errors of the padding": ("np.where(mask[:, t], delta + gamma * lam * last_gae, 0)",
                                         "delta + gamma * lam * last_gae"),
    "forgets gamma": ("gamma * lam * last_gae", "lam * last_gae"),
    "forgets gamma of the next value": ("gamma * next_value - values", "next_value - values"),
    "returns without values": ("np.where(mask, advantages + values, 0)", "np.where(mask, advantages, 0)"),
}.values())
def test_wrong_advantages_are_detected(right, wrong):
    compute = planted(gae, right, wrong)
    assert not all(advantages_are_right(compute, seed, 0.9, 0.5) for seed in range(5))


def rewards_are_right(compute):
    "The score is on the last token, the KL penalty on each, zero in the padding."
    rng, lengths = np.random.default_rng(0), np.array([6, 1, 3])
    mask, scores = np.arange(6) < lengths[:, None], rng.normal(size=3)
    logp, ref = (np.where(mask, -rng.random((3, 6)), np.nan) for _ in range(2))
    got = compute(scores, logp, ref, mask, 0.3)
    expected = np.zeros((3, 6))
    for b, n in enumerate(lengths):
        for t in range(n):
            expected[b, t] = -0.3 * (logp[b, t] - ref[b, t]) + (scores[b] if t == n - 1 else 0)
    return np.isfinite(got).all() and np.abs(got - expected).max() < 1e-6


def test_token_rewards(): assert rewards_are_right(token_rewards)


@pytest.mark.parametrize(("right", "wrong"), [
    ("mask.sum(axis=1) - 1", "-1"),
    ("mask.sum(axis=1) - 1", "mask.sum(axis=1) % mask.shape[1]"),
    ("-kl_coef", "kl_coef"),
    ("np.where(mask, -kl_coef * (logp - ref_logp), 0)", "-kl_coef * (logp - ref_logp)"),
    ("(logp - ref_logp)", "(ref_logp - logp)"),
    ("+= scores", "= scores")])
def test_wrong_token_rewards_are_detected(right, wrong):
    assert not rewards_are_right(planted(token_rewards, right, wrong))


# 4. Whitening

def whitens(compute):
    rng = np.random.default_rng(0)
    mask = rng.random((20, 9)) < 0.6
    x = np.where(mask, 5 + 3 * rng.normal(size=mask.shape), 1e6)
    y, uncentred = compute(x, mask), compute(x, mask, shift_mean=False)
    ok = abs(y[mask].mean()) < 1e-5 and abs(y[mask].var() - 1) < 1e-4
    ok &= not y[~mask].any() and not uncentred[~mask].any()
    ok &= abs(uncentred[mask].mean() - x[mask].mean()) < 1e-4
    return ok and abs(uncentred[mask].var() - 1) < 1e-4


def test_whitened_values_have_mean_0_and_variance_1(): assert whitens(whiten)


@pytest.mark.parametrize(("right", "wrong"), [
    ("(0 if shift_mean else mean)", "mean"),
    ("(0 if shift_mean else mean)", "(mean if shift_mean else 0)"),
    ("x[mask]", "x"),
    ("math.sqrt(selected.var() + 1e-8)", "selected.var()"),
    ("np.where(mask, (x", "np.where(mask | True, (x")])
def test_wrong_whitening_is_detected(right, wrong): assert not whitens(planted(whiten, right, wrong))


# 5. The gradient

def gradient_is_reinforce(make_loss):
    "At ratio 1, advantage times the gradient of the log-probability, computed independently; no leaf has 0."
    pretrained, rng = tiny(layers=2, seed=1), np.random.default_rng(0)
    policy, critic = pretrained.model, ScalarLlama.from_llama(pretrained.model)
    critic.score.weight = mx.random.normal(critic.score.weight.shape, key=mx.random.key(1))
    tokens, pad, mask = batch_of(pretrained, PROMPT_IDS, RESPONSE_IDS)
    adv = rng.normal(size=mask.shape)
    logp, _ = log_probs(policy, tokens, pad, mask.shape[1])
    zero, values = mx.zeros(mask.shape), critic_values(critic, tokens, pad, mask.shape[1])
    rollout = Rollout(tokens, pad, mask, logp, logp, values, zero, mx.array(adv, mx.float32), values + 1)
    both, batch = ActorCritic(policy, critic), Minibatch(rollout, mx.array(0.2), mx.array(1.0))
    loss = make_loss(1.0, 10.0)
    got = dict(tree_flatten(nn.value_and_grad(both, lambda model: loss(model, batch)[0])(both)[1]))

    def reinforce(policy):
        total = 0.0
        for i, (prompt, response) in enumerate(zip(PROMPT_IDS, RESPONSE_IDS)):
            z = policy(mx.array([prompt + response]))[0]
            for t, token in enumerate(response):
                at = z[len(prompt) + t - 1]
                total = total - float(adv[i, t]) * (at[token] - mx.logsumexp(at))
        return total
    expected = dict(tree_flatten(nn.value_and_grad(policy, reinforce)(policy)[1]))
    same = all(np.abs(np.array(got[f"policy.{name}"]) - np.array(g)).max() < 1e-5
               for name, g in expected.items())
    return same and all(mx.abs(g).max().item() > 0 for g in got.values())


def test_at_ratio_1_the_gradient_is_that_of_reinforce(): assert gradient_is_reinforce(ppo_loss)


@pytest.mark.parametrize(("right", "wrong"), {
    "detached log-probabilities": ("policy_loss(logp, rows", "policy_loss(mx.stop_gradient(logp), rows"),
    "detached values": ("value_loss(values, rows", "value_loss(mx.stop_gradient(values), rows"),
    "old minus new": ("policy_loss(logp, rows.logp", "policy_loss(rows.logp, logp"),
    "returns instead of advantages": ("rows.advantages", "rows.returns")}.values())
def test_a_wrong_gradient_is_detected(right, wrong):
    assert not gradient_is_reinforce(planted(ppo_loss, right, wrong))


# 6. The losses

def losses_are_right(policy, value, kl, seed):
    "The losses equal the published formulas, with NaN in the padding."
    rng = np.random.default_rng(seed)
    mask = np.arange(7) < rng.integers(1, 8, size=4)[:, None]
    new, old, adv, v, v_old, ret = (np.where(mask, rng.normal(size=mask.shape), np.nan) for _ in range(6))
    clip, vclip = rng.uniform(0.05, 0.5), rng.uniform(0.05, 1)
    r, a = np.exp(new - old)[mask], adv[mask]
    # Schulman et al. 2017: E[min(r A, clip(r) A)]; values: max((v − R)², (v_old + clip(v − v_old) − R)²) / 2
    expected_policy = -np.minimum(r * a, np.clip(r, 1 - clip, 1 + clip) * a).sum()
    v_clipped = v_old + np.clip(v - v_old, -vclip, vclip)
    expected_value = 0.5 * np.maximum((v - ret) ** 2, (v_clipped - ret) ** 2)[mask].sum()
    arrays = [mx.array(x, dtype=mx.float32) for x in (new, old, adv, v, v_old, ret)]
    m = mx.array(mask)
    loss, count, stats = policy(*arrays[:3], m, clip)
    vloss, vcount = value(*arrays[3:], m, vclip)
    is_clipped = ((a > 0) & (r > 1 + clip)) | ((a < 0) & (r < 1 - clip))
    ok = abs(loss.item() - expected_policy) < 1e-3 * max(1, abs(expected_policy))
    ok &= abs(vloss.item() - expected_value) < 1e-3 and count.item() == vcount.item() == mask.sum()
    ok &= stats["clip_fraction"].item() == is_clipped.sum()
    ok &= abs(stats["approx_kl"].item() - 0.5 * ((new - old)[mask] ** 2).sum()) < 1e-3
    p, q = (np.exp(x) / np.exp(x).sum() for x in rng.normal(size=(2, 6)))
    exact = (p * np.log(p / q)).sum()
    for kind in ("k1", "k3"): ok &= abs((p * kl(np.log(p), np.log(q), kind)).sum() - exact) < 1e-12
    return bool(ok and (kl(np.log(p), np.log(q), "k3") >= 0).all())


@forall(60, seed=st.integers(0, 10_000))
def test_losses_are_the_published_ones(seed):
    assert losses_are_right(policy_loss, value_loss, kl_estimate, seed)


@pytest.mark.parametrize(("function", "right", "wrong"), [
    (policy_loss, "mx.maximum(unclipped, clipped)", "mx.minimum(unclipped, clipped)"),
    (policy_loss, "mx.maximum(unclipped, clipped)", "unclipped"),
    (policy_loss, "mx.maximum(unclipped, clipped)", "clipped"),
    (policy_loss, "1 - clip_range", "1 / (1 + clip_range)"),
    (policy_loss, "mx.where(mask, mx.maximum", "mx.where(mask | True, mx.maximum"),
    (policy_loss, "return loss, mask.sum()", "return loss, mx.array(mask.size)"),
    (value_loss, "mx.maximum(mx.square(values - returns), mx.square(clipped - returns))",
     "mx.square(values - returns)"),
    (value_loss, "mx.maximum", "mx.minimum"),
    (value_loss, "0.5 * ", ""),
    (value_loss, "clipped - returns", "clipped - old_values"),
    (kl_estimate, "np.expm1(-log_ratio) + log_ratio", "np.expm1(log_ratio) - log_ratio"),
    (kl_estimate, "return log_ratio if", "return -log_ratio if")])
def test_wrong_losses_are_detected(function, right, wrong):
    functions = {f.__name__: f for f in (policy_loss, value_loss, kl_estimate)}
    functions[function.__name__] = planted(function, right, wrong)
    assert not all(losses_are_right(*functions.values(), seed) for seed in range(10))


def test_the_kl_penalty_is_always_k1():
    "Near the reference the push of k3 vanishes; that of k1 is the gradient of the KL."
    reported = {}
    for kind in ("k1", "k3"):
        trainer = task(count, response_length=6, batch=16, kl_coef=0.2, kl_estimator=kind)
        for _ in range(2): trainer.step()
        rollout = trainer.rollout
        penalty = np.array(-0.2 * (rollout.logp - rollout.ref_logp))
        scores = np.array(rollout.rewards) - np.where(np.array(rollout.response_mask), penalty, 0)
        assert np.allclose(scores.sum(axis=1), trainer.sampled.scores, atol=1e-5)
        reported[kind] = trainer.step()["kl"]
    assert reported["k1"] != reported["k3"] >= 0


def test_every_stop_token_ends_a_response():
    "A published model may have several; its template ends answers with one, and the model may use another."
    pretrained = tiny()
    b = 3 + pretrained.tokenizer.letters.index("b")
    pretrained.tokenizer._eos_ids = (2, b)
    trainer = task(lambda prompt, response: float(len(response)), pretrained=pretrained, response_length=12,
                   missing_eos_penalty=1.0)
    responses = trainer.sample(trainer.data, np.zeros(200, int), {"temperature": 1.0}, 0).responses
    assert {2, b} == {response[-1] for response in responses if len(response) < 12}
    assert not any({2, b} & {*response[:-1]} for response in responses)
    metrics = trainer.step()
    ended = [response[-1] in (2, b) for response in trainer.sampled.responses]
    assert metrics["eos_fraction"] == np.mean(ended) > 0.5
