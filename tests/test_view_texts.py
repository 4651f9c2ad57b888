"Views of adversarial texts and numbers: everything stays text, complete and in its place."
import html
import math
import re
import warnings
from html.parser import HTMLParser

import pytest
from common import NASTY, forall
from hypothesis import strategies as st

import mlx_pretrain  # noqa: F401, I001 (before MLX)

import mlx.core as mx
import numpy as np

from mlx_pretrain.rollout import Rollout, Samples
from mlx_pretrain.tokenizer import ByteTokenizer
from mlx_pretrain.views import PPOExplorer, RolloutView, SampledView

EVIL = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "' onmouseover='alert(1)",
        "</code></div>", "&amp;", "]]>", "<!--", "@ID@", "{0}", "$x$"]
ODD = st.one_of(st.sampled_from(EVIL + NASTY), st.text(max_size=12))       # also lone surrogates
NUMBER = st.one_of(st.sampled_from([0.0, -0.0, math.nan, math.inf, -math.inf, 1e-30, -1e30, 1.0]),
                   st.floats(width=32))
VOID = {"br", "rect", "path", "circle", "input"}


class Page(HTMLParser):
    "Parses a page: its tags with attributes, and the text outside of styles; fails if a tag is not closed."
    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.open = [], [], []
        text.encode("utf-8")                                              # a notebook must be able to hold it
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID: self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID: assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & {*self.open}: self.words.append(data)

    def handle_comment(self, data): raise AssertionError(f"a comment: {data}")

    @property
    def text(self): return "".join(self.words)

    def named(self, name): return [attrs for _, attrs in self.tags if attrs.get("class") == name]


class Tokens:
    "A tokenizer with given pieces."
    def __init__(self, pieces): self.pieces = pieces
    def piece(self, id): return self.pieces[id]


def view(prompt, pieces, numbers=None, width=None):
    "A view of one response; `numbers`: (4, tokens) of log-ratio, value, advantage, reward."
    n, width = len(pieces), width or max(1, len(pieces))
    rows = np.zeros((4, width), np.float32)
    rows[:, :n] = np.arange(n) - 1.0 if numbers is None else numbers
    tokens = mx.array([[*range(len(prompt) + n), *[0] * (width - n)]])
    ratio, value, advantage, reward = (mx.array(x[None]) for x in rows)
    mask, zero = mx.arange(width)[None] < n, mx.zeros((1, width))
    return RolloutView(Tokens([*prompt, *pieces]), Rollout(tokens, mx.array([0]), mask, ratio, zero, value,
                                                           reward, advantage, zero), 0)


def check_tags(page, allowed):
    "Only the expected elements, and no attribute that runs or loads anything."
    assert {tag for tag, _ in page.tags} <= allowed
    assert not any(name.startswith("on") or name in ("src", "href") for _, attrs in page.tags
                   for name in attrs)


@forall(prompt=st.lists(ODD, max_size=3), pieces=st.lists(ODD, min_size=1, max_size=4), data=st.data())
def test_any_rollout_is_a_well_formed_page(prompt, pieces, data):
    "Any tokens and numbers: each token appears once, with its four numbers."
    numbers = np.array([[data.draw(NUMBER) for _ in pieces] for _ in range(4)], np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rollout = view(prompt, pieces, numbers)
        page, text = Page(rollout._repr_html_()), repr(rollout)
    check_tags(page, {"style", "div", "span", "code", "p", "i", "em"})
    tokens = page.named("token")
    assert len(tokens) == len(pieces) == len(text.split("\n")) - 1
    assert all(token["title"].count("\n") == 4 for token in tokens)
    assert len([tag for tag, _ in page.tags if tag == "i"]) >= 4 * len(pieces)
    text.encode("utf-8")


@forall(texts=st.lists(st.tuples(ODD, ODD, NUMBER), min_size=1, max_size=9), n=st.integers(1, 5))
def test_any_samples_are_a_well_formed_page(texts, n):
    "Any prompts, responses and rewards: no sample appears twice, and the best comes first."
    prompts, responses, scores = zip(*texts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        samples = SampledView(Samples([], [], [*prompts], [*responses], np.array(scores, np.float32)), n)
        page, text = Page(samples._repr_html_()), repr(samples)
    check_tags(page, {"table", "tbody", "tr", "td", "div", "code", "em"})
    assert len(samples.rows) == len({*samples.rows}) == min(len(texts), 2 * n)
    assert samples.left_out == len(texts) - len(samples.rows)
    shown = [np.float32(scores[i]) for i in samples.rows]
    real = [x for x in shown if not np.isnan(x)]
    assert real == sorted(real, reverse=True) and not any(np.isnan(x) for x in shown[:len(real)])
    assert len(text.split("\n")) == len(samples.rows)
    text.encode("utf-8")


@pytest.mark.parametrize("evil", EVIL)
def test_html_in_texts_is_escaped(evil):
    "It is text, in the page and in titles."
    rollout = Page(view([evil], [evil])._repr_html_())
    assert rollout.text.endswith(evil + evil.replace(" ", "␣"))
    assert rollout.named("token")[0]["title"].startswith(evil.replace(" ", "␣"))
    assert rollout.named("prompt")[0]["title"] == evil
    samples = Page(SampledView(Samples([], [], [evil], [evil], np.array([1.0])))._repr_html_())
    titles = [attrs["title"] for _, attrs in samples.tags if "title" in attrs]
    assert samples.text.count(evil) == 2 and titles == [evil, evil]


@pytest.mark.parametrize("piece, visible", [
    (" ", "␣"), ("\n", "↵"), ("\t", "→"), ("", "∅"), ("\0", "␀"), ("\x7f", "␡"), (" a\n b", "␣a↵␣b"),
    ("\ud800", "�"), ("\ud83d\ude42", "🙂"), ("<0xE2>", "<0xE2>"), ("e\u0301", "e\u0301")])
def test_invisible_characters_get_a_sign(piece, visible):
    "Spaces, line breaks, control characters and empty tokens are visible in page, title and text."
    rollout = view([], [piece])
    page = Page(rollout._repr_html_())
    assert page.text.endswith(visible) and repr(rollout).endswith("  " + visible)
    assert page.named("token")[0]["title"].split("\n")[0] == visible


def test_the_bytes_of_a_character_are_separate_tokens():
    "With a byte tokenizer, parts of a character have the names of their bytes, and no byte is lost."
    tok = ByteTokenizer()
    ids = tok.encode("é\n")
    n, zero = len(ids), mx.zeros((1, len(ids)))
    mask = mx.ones((1, n), dtype=mx.bool_)
    rollout = RolloutView(tok, Rollout(mx.array([ids]), mx.array([0]), mask, *[zero] * 6), 0)
    page = Page(rollout._repr_html_())
    assert rollout.prompt == "" and not page.named("prompt") and page.text.endswith("<0xC3><0xA9>↵")


def colors(rollout):
    "Backgrounds of the cells: one list per token."
    tokens = rollout._repr_html_().split('class="token"')[1:]
    return [re.findall(r'<i style="background:([^"]*)"', token) for token in tokens]


def test_color_is_sign_and_strength():
    "Per row: orange below zero, blue above, the largest in full color, none for zero, hatched for NaN."
    nan, inf = math.nan, math.inf
    found = colors(view([], ["a", "b", "c"], [[1, -2, 0], [-1e-6, 1e-6, 0], [nan, 5, -inf], [0, 0, 0]]))
    orange, blue = (lambda a: f"rgba(224,123,0,{a:.2f})"), (lambda a: f"rgba(43,143,219,{a:.2f})")
    assert [row[0] for row in found] == [blue(0.56), orange(1), "none"]
    assert [row[1] for row in found] == [orange(1), blue(1), "none"]
    assert found[0][2].startswith("repeating-linear-gradient")
    assert [row[2] for row in found[1:]] == [blue(1), orange(1)]
    assert [row[3] for row in found] == ["none"] * 3


def test_numbers_belong_to_their_token():
    "Padding on both sides is left out."
    tokens, zero = mx.array([[9, 9, 0, 1, 2, 9], [0, 1, 2, 3, 4, 5]]), mx.zeros((2, 3))
    mask = mx.array([[True, True, False], [True, True, True]])
    logp, value, reward, advantage = (mx.array([[1.0, 2, 7], [3, 4, 5]]) * 10 ** i for i in range(4))
    rollout = Rollout(tokens, mx.array([2, 0]), mask, logp, zero - 0.5, value, reward, advantage, zero)
    first = RolloutView(Tokens("abcdef"), rollout, 0)
    assert (first.prompt, first.pieces) == ("a", ["b", "c"])
    assert {name: row.tolist() for name, row in first.rows.items()} == {
        "log-ratio": [1.5, 2.5], "value": [10, 20], "advantage": [1000, 2000], "reward": [100, 200]}
    titles = re.findall(r'class="token" tabindex="0" title="([^"]*)"', first._repr_html_())
    titles = [html.unescape(title) for title in titles]
    assert titles[1].split("\n") == ["c", "log-ratio +2.5", "value     +20", "advantage +2e+03",
                                     "reward    +200"]
    assert repr(first).split("\n") == ["  log-ratio      value  advantage     reward  token",
                                       "        1.5         10      1e+03        100  b",
                                       "        2.5         20      2e+03        200  c"]
    assert RolloutView(Tokens("abcdef"), rollout, 1).prompt == "abc"
    for row in (-1, 2):
        with pytest.raises(ValueError, match=f"no row {row} "): RolloutView(Tokens("abcdef"), rollout, row)


def test_one_token_and_none():
    "A response of one token is a column; one of none is an empty view, not an error."
    assert len(colors(view(["x"], ["y"]))) == 1
    empty = view(["x"], [], np.zeros((4, 0)))
    assert colors(empty) == [] and Page(empty._repr_html_()).text.endswith("x") and "token" in repr(empty)


def test_long_texts_are_shortened_and_complete_in_the_title():
    book = "begin" + "x" * 5000 + "end"
    page = Page(view([book], ["y"])._repr_html_())
    assert page.named("prompt")[0]["title"] == book
    assert len(page.text) < 1500 and "begin" in page.text and "endy" in page.text
    samples = Page(SampledView(Samples([], [], ["?"], [book], np.array([1.0])))._repr_html_())
    assert any(attrs.get("title") == book for _, attrs in samples.tags) and len(samples.text) < 600


def test_equal_rewards_keep_their_order():
    "Of equal rewards, the first are the best and the last are the worst."
    samples = Samples([], [], ["?"] * 400, ["!"] * 400, np.tile([1.0, 2.0], 200))
    assert SampledView(samples, 2).rows == [1, 3, 396, 398]


def test_explorer_starts_with_the_given_values():
    "Both ends of each slider are allowed."
    for clip_range, kl_coef in ((0.05, 0), (0.5, 2), (0.2, 1e-2)):
        page = Page(PPOExplorer(clip_range, kl_coef)._repr_html_())
        values = {attrs["name"]: float(attrs["value"]) for tag, attrs in page.tags if tag == "input"}
        assert (values["clip_range"], values["kl_coef"]) == (clip_range, kl_coef)
    for wrong in ({"clip_range": 0.51}, {"clip_range": math.nan}, {"kl_coef": -0.01}, {"kl_coef": math.inf}):
        with pytest.raises(ValueError, match="its slider goes from"): PPOExplorer(**wrong)
