"""Generation: top-k and top-p, batch invariance, EOS, and streaming."""
import mlx_pretrain  # noqa: F401, I001 - before MLX, as everywhere

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_map

from mlx_pretrain.config import UserError
from mlx_pretrain.core import key_for
from mlx_pretrain.generate import (
    GenerateError, Generation, generate, generate_text, response_mask, sample, stream_text, text_pieces)
from mlx_pretrain.model import Llama, LlamaArgs
from mlx_pretrain.tokenizer import ByteTokenizer, train_sentencepiece

V, PAD, EOS = 40, 0, 3
ARGS = LlamaArgs(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
                 tie_word_embeddings=False)
HOW = {"eos_ids": [EOS], "pad_id": PAD}
PROMPTS = [[5], [9, 8, 7, 6, 5, 4, 10, 11, 12], [20, 21, 22], [5]]


def opinionated(cls=Llama, args=ARGS, seed=1):
    model = cls(args, seed)
    model.update(tree_map(lambda w: 10 * w if w.ndim > 1 else w, model.parameters()))
    return model


MODEL = opinionated()


def rows(out):
    return [tokens[mask].tolist() for tokens, mask in zip(np.array(out.tokens), np.array(out.response_mask),
                                                          strict=True)]


def uncached(model, prompt, n, eos=(EOS,)):
    ids = list(prompt)
    for _ in range(n):
        ids.append(model(mx.array([ids]))[0, -1].argmax().item())
        if ids[-1] in eos: break
    return ids[len(prompt):]


# ---- sample

def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def by_definition(logits, temperature, top_k, top_p):
    "The distribution to draw from, one row, in float64: sort, cut, normalise."
    p = softmax(logits.astype(np.float64) / temperature)
    ranked = sorted(range(len(p)), key=lambda i: -p[i])
    if top_k: ranked = ranked[:top_k]
    share, total, kept = p / p[ranked].sum(), 0.0, []
    for i in ranked:
        kept.append(i)
        total += share[i]
        if total >= top_p and top_p < 1: break
    return np.where(np.isin(np.arange(len(p)), kept), p, 0) / p[kept].sum()


def support(logits, n=4000, **how):
    "The frequency of each sampled token."
    drawn = np.array(sample(mx.broadcast_to(mx.array(logits, mx.float32), (n, len(logits))),
                            key_for(0, 0, "test"), **how))
    return np.bincount(drawn, minlength=len(logits)) / n


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10_000), size=st.integers(1, 12), k=st.integers(0, 14),
       p=st.sampled_from([0.05, 0.3, 0.5, 0.77, 0.9, 0.999, 1.0]),
       temperature=st.sampled_from([0.5, 1.0, 2.5]))
def test_filters_match_their_definition(seed, size, k, p, temperature):
    logits = np.random.default_rng(seed).normal(size=size) * 2
    want = by_definition(logits, temperature, k, p)
    seen = support(logits, temperature=temperature, top_k=k, top_p=p)
    assert not seen[want == 0].any()                                      # nothing that was cut is ever drawn
    assert abs(seen - want).max() < 5 * np.sqrt(0.25 / 4000)              # and the rest as often as it should


@pytest.mark.parametrize("how,kept", [
    ({"top_k": 1}, [1]), ({"top_k": 3}, [1, 2, 3]), ({"top_k": 99}, [0, 1, 2, 3, 4]),
    ({"top_p": 0.39}, [1]), ({"top_p": 0.41}, [1, 2]), ({"top_p": 0.66}, [1, 2, 3]), ({"top_p": 1e-9}, [1]),
    ({"top_p": 0.68}, [1, 2, 3]), ({"top_k": 4, "top_p": 0.68}, [1, 2]),
])
def test_filters_by_hand(how, kept):
    seen = support(np.log([0.05, 0.4, 0.25, 0.2, 0.1]), **how)
    assert np.flatnonzero(seen).tolist() == kept


def test_top_k_keeps_k_of_equal_tokens():
    assert (support(np.zeros(10), top_k=4) > 0).sum() == 4
    assert (support(np.zeros(10), top_p=0.5) > 0).sum() in (5, 6)         # ten times 0.1 is not exact


def test_frequencies_match_softmax():
    logits = np.random.default_rng(0).normal(size=8)
    for temperature in (0.7, 1.0, 3.0):
        p, n = softmax(logits / temperature), 50_000
        chi2 = (n * (support(logits, n, temperature=temperature) - p) ** 2 / p).sum()
        assert chi2 < 24.3  # 999 of 1,000 correct samples, 7 degrees of freedom


def test_temperature_to_zero_is_greedy():
    logits = mx.random.normal((200, 50), key=mx.random.key(0))
    for scale in (1.0, 1e4, 1e37):
        for t in (0, 0.0, 1e-40, 1e-12, 1e-7, 2e-6):
            assert mx.array_equal(sample(scale * logits, mx.random.key(1), t), logits.argmax(-1))
    agree = [mx.mean(sample(logits, mx.random.key(1), t) == logits.argmax(-1)).item()
             for t in (3.0, 1.0, 0.3, 0.1, 2e-6)]
    assert agree == sorted(agree) and agree[0] < 0.5 and agree[-1] == 1


def test_sample_depends_only_on_its_keys():
    logits = mx.random.normal((6, 50), key=mx.random.key(0))
    keys = mx.random.split(mx.random.key(5), 6)
    together = sample(logits, keys)
    assert together.dtype == mx.int32
    for i in range(6): assert sample(logits[i:i + 1], keys[i:i + 1]).item() == together[i].item()
    mx.random.seed(1)
    assert mx.array_equal(sample(logits, keys), together)
    assert mx.array_equal(sample(logits.astype(mx.bfloat16), keys, 0), logits.astype(mx.bfloat16).argmax(-1))


# ---- generate

def test_greedy_equals_uncached_argmax():
    out = generate(MODEL, PROMPTS, 12, temperature=0, **HOW)
    assert isinstance(out, Generation)
    assert rows(out) == [uncached(MODEL, p, 12) for p in PROMPTS]
    # both ways to end are in this test
    assert any(len(r) < 12 for r in rows(out)) and any(len(r) == 12 for r in rows(out))


@settings(deadline=None, max_examples=15)
@given(st.lists(st.lists(st.integers(0, V - 1), min_size=1, max_size=9), min_size=1, max_size=5),
       st.sampled_from([0.0, 0.8, 1.5]))
def test_batch_invariance(prompts, temperature):
    how = {"temperature": temperature, "top_k": 20, "top_p": 0.95, **HOW}
    together = rows(generate(MODEL, prompts, 8, **how))
    for n, prompt in enumerate(prompts):
        if prompt not in prompts[:n]: assert rows(generate(MODEL, [prompt], 8, **how))[0] == together[n]


def test_copies_differ_and_are_reproducible():
    out = rows(generate(MODEL, [[5]] * 6, 12, **HOW))
    assert len(set(map(tuple, out))) > 3
    assert rows(generate(MODEL, [[6], *[[5]] * 6], 12, **HOW))[1:] == out
    assert rows(generate(MODEL, [[5]] * 6, 12, seed=1,
                         **HOW)) != out != rows(generate(MODEL, [[5]] * 6, 12, step=1, **HOW))
    mx.random.seed(3)
    assert rows(generate(MODEL, [[5]] * 6, 12, **HOW)) == out


def test_sampled_tokens_follow_the_models_probabilities():
    "The second token given the first, over copies of one prompt: a key used twice would show here."
    out = np.array(generate(MODEL, [[5]] * 6000, 2, temperature=3.0, eos_ids=[], pad_id=PAD).tokens)
    first = softmax(np.array(MODEL(mx.array([[5]]))[0, -1]) / 3)
    # (first token, second token)
    second = softmax(np.array(MODEL(mx.array([[5, t] for t in range(V)]))[:, -1]) / 3)
    want = (first[:, None] * second).sum(0) * 6000
    chi2 = ((np.bincount(out[:, 1], minlength=V) - want) ** 2 / want).sum()
    assert want.min() > 1 and chi2 < 73


class Unmasked(Llama):
    "Planted bug: padding is attended to."
    def hidden(self, ids, cache=None, pad=None): return super().hidden(ids, cache, None)


class Shifted(Llama):
    "Planted bug: positions of a cached token are one too far."
    def hidden(self, ids, cache=None, pad=None):
        if cache and cache[0].length: ids = mx.concatenate([ids, ids], axis=1)
        return super().hidden(ids, cache, pad)


def test_planted_padding_bug_is_detected():
    unmasked = opinionated(Unmasked)
    together = rows(generate(unmasked, PROMPTS, 12, temperature=0, **HOW))
    alone = [rows(generate(unmasked, [p], 12, temperature=0, **HOW))[0] for p in PROMPTS]
    assert together[1] == alone[1] and together[0] != alone[0] and together[2] != alone[2]


def test_planted_cache_bug_is_detected():
    shifted = opinionated(Shifted, ARGS.model_copy(update={"max_position_embeddings": 64}))
    shifted.make_cache = lambda batch, capacity: Llama.make_cache(shifted, batch, 2 * capacity)
    assert rows(generate(shifted, [[20, 21, 22]], 12, temperature=0,
                         **HOW)) != [uncached(MODEL, [20, 21, 22], 12)]


class Counting:
    "After t always comes t + 1."
    args, head_weight = ARGS.model_copy(update={"max_position_embeddings": 5000}), mx.eye(V)

    def __init__(self): self.passes = 0

    def make_cache(self, batch, capacity): return None

    def hidden(self, ids, cache, pad):
        self.passes += 1
        return 50 * mx.eye(V)[(ids + 1) % V]


def test_eos_stops_and_counts():
    model = Counting()
    out = generate(model, [[8], [5, 6], [11], [38]], 4000, eos_ids=[12, 39], pad_id=PAD)
    assert rows(out) == [[9, 10, 11, 12], [7, 8, 9, 10, 11, 12], [12], [39]]
    assert model.passes == 6
    tokens, mask = np.array(out.tokens), np.array(out.response_mask)
    assert tokens.shape == mask.shape == (4, 4000) and (tokens[~mask] == PAD).all()


def test_planted_mask_without_eos_is_detected():
    "The check that PPO relies on detects the tempting `tokens != eos`."
    out = generate(Counting(), [[8], [5, 6]], 20, eos_ids=[12], pad_id=PAD)
    tokens, mask = np.array(out.tokens), np.array(out.response_mask)

    def ends_in_eos(mask): return all(row[m][-1] == 12 for row, m in zip(tokens, mask, strict=True))
    assert (
        ends_in_eos(mask) and not ends_in_eos(mask & (tokens != 12)) and not ends_in_eos(tokens != PAD + 99)
    )


@settings(max_examples=200)
@given(st.lists(st.lists(st.integers(0, 5), min_size=6, max_size=6), min_size=1, max_size=4),
       st.sets(st.integers(0, 5), max_size=3))
def test_mask_by_hand(tokens, eos):
    mask = response_mask(np.array(tokens), eos)
    for row, got in zip(tokens, mask.tolist(), strict=True):
        end = next((i for i, t in enumerate(row) if t in eos), 5)
        assert got == [i <= end for i in range(6)]


def test_pad_may_be_eos():
    out = generate(Counting(), [[8], [5, 6]], 20, eos_ids=[12], pad_id=12)
    assert rows(out) == [[9, 10, 11, 12], [7, 8, 9, 10, 11, 12]]


def test_without_eos_all_columns_are_filled():
    out = generate(Counting(), [[8]], 60, eos_ids=[], pad_id=PAD)
    assert rows(out) == [[(9 + i) % V for i in range(60)]]


def test_bfloat16_model():
    half = Llama(ARGS)
    half.set_dtype(mx.bfloat16)
    assert generate(half, PROMPTS, 4, **HOW).tokens.shape == (4, 4)


@pytest.mark.parametrize("prompts,new,eos,pad,words", [
    ([], 4, [EOS], PAD, "no prompt"),
    ([[5], []], 4, [EOS], PAD, "prompt 2 is empty"),
    ([[5], [V]], 4, [EOS], PAD, "prompt 2 holds the token 40"),
    ([[-1]], 4, [EOS], PAD, "the token -1"),
    ([[2**70]], 4, [EOS], PAD, "integers"),
    ([[1.0]], 4, [EOS], PAD, "integers"),
    ([["a"]], 4, [EOS], PAD, "integers"),
    ([[[1]]], 4, [EOS], PAD, "list of token ids"),
    ([[5]], 4, [V], PAD, "special tokens holds the token 40"),
    ([[5]], 4, [EOS], V, "special tokens holds the token 40"),
    ([[5]], 0, [EOS], PAD, "at least 1"),
    ([[5] * 10], 55, [EOS], PAD, "do not fit into this model's context of 64"),
])
def test_prompt_errors(prompts, new, eos, pad, words):
    with pytest.raises(GenerateError) as caught: generate(MODEL, prompts, new, eos_ids=eos, pad_id=pad)
    assert (
        words in str(caught.value) and "\n" not in str(caught.value) and isinstance(caught.value, UserError)
    )


def test_the_whole_context_can_be_used():
    assert generate(MODEL, [[5] * 10], 54, eos_ids=[], pad_id=PAD).tokens.shape == (1, 54)


@pytest.mark.parametrize("how",
                         [{"temperature": -0.1}, {"temperature": float("nan")}, {"temperature": float("inf")},
                          {"top_k": -1},
                                 {"top_p": 0.0}, {"top_p": 1.01}, {"top_p": float("nan")}])
def test_settings_out_of_range(how):
    name = next(iter(how))
    with pytest.raises(GenerateError, match=name): generate(MODEL, [[5]], 4, **how, **HOW)
    with pytest.raises(GenerateError, match=name): sample(mx.zeros((1, 4)), mx.random.key(0), **how)
    with pytest.raises(GenerateError, match=name): stream_text(BYTE_MODEL, BYTE, "a", 4, **how)


# ---- text

BYTE = ByteTokenizer()
BYTE_MODEL = opinionated(args=ARGS.model_copy(update={"vocab_size": BYTE.vocab_size,
                                                      "max_position_embeddings": 300}))


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    texts = ["The llama eats grass.\n  The grass is green, the llama is happy.", "Grüße! naïve café"] * 20
    return train_sentencepiece(texts, 300, tmp_path_factory.mktemp("sp"))


@settings(deadline=None, max_examples=300)
@given(st.lists(st.integers(0, BYTE.vocab_size - 1), max_size=60), st.text(max_size=5))
def test_pieces_join_to_the_text_for_any_bytes(tokens, prompt):
    pieces = list(text_pieces(BYTE, BYTE.encode(prompt), tokens))
    assert "".join(pieces) == BYTE.decode(tokens) and "" not in pieces


@settings(deadline=None, max_examples=200)
@given(st.text(max_size=30))
def test_characters_are_complete_and_not_delayed(text):
    "Every character is a piece of its own, emitted with its last byte."
    tokens, shown = iter(text.encode()), []
    taken = 0

    def feed():
        nonlocal taken
        for token in tokens:
            taken += 1
            yield token
    for piece in text_pieces(BYTE, [], feed()):
        shown.append(piece)
        if "\ufffd" not in text: assert len("".join(shown).encode()) == taken
    assert "".join(shown) == text
    if "\ufffd" not in text: assert shown == list(text)


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_pieces_of_sentencepiece(sentencepiece, data):
    tokens = data.draw(st.lists(st.integers(0, sentencepiece.vocab_size - 1), max_size=30))
    pieces = list(text_pieces(sentencepiece, sentencepiece.encode("The llama"), tokens))
    assert (
        "".join(pieces)
        == sentencepiece.decode(sentencepiece.encode("The llama") + tokens)[len("The llama") :]
    )
    text = "a 🦙 ate\n  the grüße"
    assert not any("\ufffd" in piece for piece in text_pieces(sentencepiece, [], sentencepiece.encode(text)))


@pytest.mark.parametrize("broken", range(14))
def test_character_after_invalid_bytes_is_complete(broken):
    "Buffered tokens are never cut inside a character that may still become complete."
    for character in ("é", "€", "🦙"):
        data = b"\xff" * broken + character.encode()
        pieces = list(text_pieces(BYTE, [], data))
        assert "".join(pieces) == BYTE.decode(data) and pieces[-1].endswith(character)


def test_literal_replacement_character_is_text():
    assert "".join(text_pieces(BYTE, [], "a\ufffdb\ufffd".encode())) == "a\ufffdb\ufffd"


@pytest.mark.parametrize("endless",
                         [b"a", b"\xff", b"\x80", b"\xf0\x9f\xa6\x99", b"\xe2\x82", [256], [257, 65]])
def test_work_is_linear(endless):
    class Slow(ByteTokenizer):
        decoded = 0

        def _decode(self, ids):
            self.decoded += len(ids)
            return super()._decode(ids)
    tokenizer = Slow()
    list(text_pieces(tokenizer, [65] * 20, list(endless) * 1000))
    assert tokenizer.decoded < 150 * 1000 * len(endless)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 5.0])
def test_stream_equals_batch(temperature):
    prompts = ["", "One", "Two 🦙", "a longer prompt, so that there is padding"]
    batch = generate_text(BYTE_MODEL, BYTE, prompts, 60, temperature, seed=2)
    assert ["".join(stream_text(BYTE_MODEL, BYTE, p, 60, temperature, seed=2)) for p in prompts] == batch
    for prompt, text in zip(prompts, batch, strict=True):
        ids = [BYTE.bos_id, *BYTE.encode(prompt)]
        [tokens] = rows(generate(BYTE_MODEL, [ids], 60, eos_ids=[BYTE.eos_id], pad_id=BYTE.pad_id,
                                 temperature=temperature, seed=2))
        assert text == BYTE.decode(tokens)


class Reciter:
    "Generates given tokens, for any prompt."
    args = ARGS.model_copy(update={"vocab_size": BYTE.vocab_size, "max_position_embeddings": 300})
    head_weight = mx.eye(BYTE.vocab_size)

    def __init__(self, tokens): self.tokens, self.read = iter(tokens), 0

    def make_cache(self, batch, capacity): return None

    def hidden(self, ids, cache, pad):
        self.read += 1
        return 99 * mx.eye(BYTE.vocab_size)[mx.array([[next(self.tokens)]])]


def test_stream_of_emoji_stops_at_eos_and_is_lazy():
    model = Reciter([*"é🦙!".encode(), BYTE.eos_id, *b"never"])
    stream = stream_text(model, BYTE, "", 100)
    assert model.read == 0
    assert (next(stream), model.read) == ("é", 2)
    assert (next(stream), model.read) == ("🦙", 6)
    assert list(stream) == ["!"] and model.read == 8
    assert list(stream_text(Reciter("🦙".encode()[:3]), BYTE, "", 3)) == ["\ufffd"]


def test_prompt_begins_with_bos():
    asked = []

    class Listening(Reciter):
        def hidden(self, ids, cache, pad):
            asked.append(ids.tolist())
            return super().hidden(ids, cache, pad)
    list(stream_text(Listening([65, BYTE.eos_id]), BYTE, "hé", 10))
    assert asked == [[[BYTE.bos_id, *"hé".encode()]], [[65]]]


class NoBos(ByteTokenizer):
    def __init__(self):
        super().__init__()
        self.bos_id = None


def test_text_errors():
    with pytest.raises(GenerateError, match="prompt 1 is empty"): stream_text(BYTE_MODEL, NoBos(), "")
    with pytest.raises(GenerateError, match="do not fit"): stream_text(BYTE_MODEL, BYTE, "x" * 100)
    with pytest.raises(GenerateError, match="no prompt"): generate_text(BYTE_MODEL, BYTE, [])
    with pytest.raises(GenerateError, match="use the tokenizer it was trained with"):
        generate_text(MODEL, BYTE, ["a"], 4)
    assert len(generate_text(BYTE_MODEL, NoBos(), ["a"], 4)) == 1


def test_one_eval_per_token(monkeypatch):
    calls, real = [], mx.eval
    monkeypatch.setattr(mx, "eval", lambda *a: (calls.append(1), real(*a)))
    generate(MODEL, PROMPTS, 7, eos_ids=[], pad_id=PAD)
    assert len(calls) == 7


def test_model_is_not_changed():
    before = {k: v + 0 for k, v in tree_flatten(MODEL.parameters())}
    generate(MODEL, PROMPTS, 4, **HOW)
    assert all(mx.array_equal(v, before[k]) for k, v in tree_flatten(MODEL.parameters()))
