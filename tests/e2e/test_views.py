"`views` in a real browser: the scripts compute what trains, and texts of a model are escaped."
import math
from itertools import product

import pytest

import mlx_pretrain  # noqa: F401, I001 (before MLX)

import mlx.core as mx
import numpy as np

from mlx_pretrain.rollout import Rollout, Samples, policy_loss
from mlx_pretrain.views import PPOExplorer, RolloutView, SampledView


@pytest.fixture
def page(browser):
    "A page that records its network requests and script errors."
    page = browser.new_page(viewport={"width": 1100, "height": 800})
    page.asked, page.wrong = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    yield page
    page.close()


def show(page, *views, style=""):
    page.set_content(f"<!doctype html><body style='{style}'>{''.join(views)}</body>")


def drag(page, name, part, root=".ppo-explorer"):
    "Drag a slider with the mouse to a part of its range, 0 to 1; returns its value."
    slider = page.locator(f"{root} [name={name}]")
    low, high, now = (float(slider.evaluate(f"s => s.{key}")) for key in ("min", "max", "value"))
    box = slider.bounding_box()  # half a handle, which never leaves the slider
    half = 8
    at = lambda share: box["x"] + half + share * (box["width"] - 2 * half)
    page.mouse.move(at((now - low) / (high - low)), box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(at(part), box["y"] + box["height"] / 2, steps=4)
    page.mouse.up()
    stands = float(slider.input_value())
    assert abs(stands - (low + part * (high - low))) < 0.03 * (high - low), (
        "the handle did not follow the mouse"
    )
    return stands


def found(page, root=".ppo-explorer"):
    "The numbers that the page computed."
    values = page.locator(root).evaluate("r => [r.dataset.objective, r.dataset.gradient, r.dataset.bestKl]")
    return [float(value) for value in values]


def trained(r, A, clip):
    "Objective and slope in the ratio, from the loss that trains."
    def objective(logp): return -policy_loss(logp, mx.zeros(1), mx.array([A]), mx.array([True]), clip)[0]
    value, slope = mx.value_and_grad(objective)(mx.array([math.log(r)]))
    return value.item(), slope.item() / r


def farthest(price):
    "The KL of the highest penalized reward, by search over policies ∝ exp(m · reward), m in steps of 0.001."
    kl = np.square(np.arange(0, 20, 0.001)) / 2
    return kl[np.argmax(np.sqrt(2 * kl) - price * kl)]


def pressed(page, A): page.get_by_role("button", name="+1" if A > 0 else "−1").click()


def compare(page):
    "Move the sliders to many values, and compare; returns the values."
    places = []
    for A, clip_part, ratio_part in product((1.0, -1.0), (0.1, 0.9), (0.07, 0.33, 0.52, 0.74, 0.97)):
        pressed(page, A)
        clip, r = drag(page, "clip_range", clip_part), drag(page, "ratio", ratio_part)
        assert min(abs(r - 1 - clip), abs(r - 1 + clip)) > 1e-3, "a corner has no slope to compare"
        np.testing.assert_allclose(found(page)[:2], trained(r, A, clip), atol=1e-5,
                                   err_msg=f"ratio {r}, {A}, clip_range {clip}")
        places.append((A, clip, r))
    return places


def test_objective_and_gradient_are_those_of_the_loss(page):
    "At any values of the sliders the page has the numbers of `policy_loss`, clipped or not."
    show(page, PPOExplorer()._repr_html_())
    places = compare(page)
    slopes = [trained(r, A, clip)[1] for A, clip, r in places]
    assert len(set(places)) == 20 and {round(s) for s in slopes} == {-1, 0, 1}
    assert not page.wrong


@pytest.mark.parametrize("right, wrong", [
    ("=> Math.min(r * A, clipTo(r, clip) * A)", "=> Math.max(r * A, clipTo(r, clip) * A)"),
    ("? A : 0;", "? A : A;"), ("Math.max(r, 1 - clip)", "Math.max(r, 1)"),
    ('addEventListener("input", draw)', 'addEventListener("inptu", draw)')])
def test_a_wrong_script_is_detected(page, right, wrong):
    "The maximum, a slope where it is flat, clipping on one side only, or sliders without effect."
    html = PPOExplorer()._repr_html_()
    assert html.count(right) == 1
    show(page, html.replace(right, wrong))
    with pytest.raises(AssertionError, match="ratio "): compare(page)


def test_the_marked_kl_is_the_optimum(page):
    "At any kl_coef."
    show(page, PPOExplorer()._repr_html_())
    for part in (0.13, 0.25, 0.5, 1.0):
        price = drag(page, "kl_coef", part)
        assert abs(found(page)[2] - farthest(price)) < 0.01 * farthest(price) + 1e-3
        assert f"kl_coef {price:.2f}: the optimum is " in page.locator(".sentence").last.inner_text()
    drag(page, "kl_coef", 0.0)
    assert found(page)[2] == math.inf
    assert "nothing holds the policy" in page.locator(".sentence").last.inner_text()
    show(page, PPOExplorer(kl_coef=0.1)._repr_html_())
    assert abs(found(page)[2] - 50) < 1e-9
    assert "beyond the right edge" in page.locator(".sentence").last.inner_text()
    assert not page.locator(".distance circle").is_visible()


READ = """svg => {
  const ticks = kind => [...svg.querySelectorAll("text." + kind)].map(t => [
    parseFloat(t.textContent.replace("\\u2212", "-")),
    +t.getAttribute(kind) - (kind === "y" ? 4 : 0)]);
  const inverse = ([[a, at], [b, bt]]) => v => a + (b - a) * (v - at) / (bt - at);
  const x = inverse(ticks("x")), y = inverse(ticks("y"));
  const points = path => (path.getAttribute("d") || "").split(/[ML]/).slice(1)
    .map(p => p.split(" ").map(Number)).map(([u, v]) => [x(u), y(v)]);
  const dot = svg.querySelector("circle");
  return {live: points(svg.querySelector(".live")), faint: points(svg.querySelector(".faint")),
    flat: svg.querySelector(".flat") && points(svg.querySelector(".flat")),
    dot: [x(+dot.getAttribute("cx")), y(+dot.getAttribute("cy"))]};
}"""


@pytest.mark.parametrize("A", [1.0, -1.0])
def test_the_drawn_objective_is_correct(page, A):
    "By the ticks of the picture: the objective is live and flat part, the faint line ratio times A."
    show(page, PPOExplorer(clip_range=0.3)._repr_html_())
    pressed(page, A)
    r = drag(page, "ratio", 0.4)
    seen = page.locator(".clipping").evaluate(READ)
    for x, y in seen["live"] + seen["flat"]: assert abs(y - trained(max(x, 1e-6), A, 0.3)[0]) < 2e-3
    for x, y in seen["faint"]: assert abs(y - x * A) < 1e-3
    assert all((x >= 1.3 - 1e-3) if A > 0 else (x <= 0.7 + 1e-3) for x, _ in seen["flat"])
    assert np.ptp([x for x, _ in seen["live"] + seen["flat"]]) > 1.99
    np.testing.assert_allclose(seen["dot"], [r, trained(r, A, 0.3)[0]], atol=1e-3)


def test_the_drawn_reward_is_correct(page):
    "The faint line is √(2 KL), the full one minus the penalty, and the dot is at its maximum."
    show(page, PPOExplorer(kl_coef=0.5)._repr_html_())
    seen = page.locator(".distance").evaluate(READ)
    for x, y in seen["faint"]: assert abs(y - math.sqrt(2 * max(0, x))) < 0.03
    for x, y in seen["live"]: assert abs(y - (math.sqrt(2 * max(0, x)) - 0.5 * x)) < 0.03
    np.testing.assert_allclose(seen["dot"], [2, 1], atol=1e-3)
    assert abs(max(y for _, y in seen["live"]) - 1) < 0.01 and max(x for x, _ in seen["faint"]) > 11.9


def test_the_keyboard_works(page):
    "Tab reaches all controls, arrows move the sliders, space presses the buttons, and the sentence changes."
    show(page, PPOExplorer()._repr_html_())
    order = []
    for _ in range(5):
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.name || document.activeElement.value"))
    assert order == ["ratio", "1", "-1", "clip_range", "kl_coef"]
    page.locator("[name=ratio]").focus()
    for _ in range(25): page.keyboard.press("ArrowLeft")                  # 1.35 → 1.10
    assert page.locator(".sentence").first.inner_text() == "ratio 1.10: gradient +1.00, makes it more likely"
    page.keyboard.press("End")
    assert page.locator(".sentence").first.inner_text().startswith("ratio 2.00: clipped, gradient 0")
    page.keyboard.press("Tab"); page.keyboard.press("Tab"); page.keyboard.press("Space")
    assert page.locator(".sentence").first.inner_text() == "ratio 2.00: gradient −1.00, makes it less likely"
    assert page.get_by_role("button", pressed=True).inner_text() == "worse: −1"
    page.locator("[name=clip_range]").focus(); page.keyboard.press("Home")
    assert page.locator("output").first.inner_text() == "0.05"
    assert all(page.locator("input").nth(i).get_attribute("aria-label") for i in range(3))


def test_pictures_are_independent(page):
    "Two renderings on a page, and the same id twice as from two notebooks: each has its own numbers."
    explorer = PPOExplorer()
    twice = explorer._repr_html_()
    show(page, twice, twice, explorer._repr_html_())
    at = [f".ppo-explorer >> nth={i}" for i in range(3)]
    assert [found(page, root) for root in at] == [found(page, at[0])] * 3
    page.locator(f"{at[1]} >> [name=ratio]").focus(); page.keyboard.press("Home")
    assert [found(page, root)[0] for root in at] == [1.2, 0, 1.2] and not page.wrong


EVIL = ["<script>window.hit = 1</script>", "<img src=x onerror='window.hit = 1'>",
        '"><svg onload="window.hit = 1">', "&lt;b&gt;", "</div>"]


class Tokens:
    "A tokenizer with given pieces."
    def __init__(self, *pieces): self.pieces = pieces
    def piece(self, id): return self.pieces[id]


def rollout(tokens, prompt=1):
    "A rollout of one response; the numbers are the positions of the tokens, alternating in sign."
    n = len(tokens.pieces) - prompt
    numbers = mx.array([[(-1.0) ** i * i for i in range(n)]])
    ids, mask, zero = mx.arange(n + prompt)[None], mx.ones((1, n), dtype=mx.bool_), mx.zeros((1, n))
    return Rollout(ids, mx.array([0]), mask, numbers, zero, 2 * numbers, 3 * numbers, 4 * numbers, zero)


def test_texts_are_escaped(page):
    "Prompts, responses and tokens appear unchanged: nothing runs, nothing is requested, nothing is lost."
    tokens = Tokens(*EVIL, *EVIL)
    said = Samples([], [], EVIL, EVIL[::-1], np.arange(5.0))
    show(page, RolloutView(tokens, rollout(tokens, 5), 0)._repr_html_(), SampledView(said)._repr_html_())
    assert page.evaluate("window.hit") is None and page.locator("img, script, svg").count() == 0
    assert page.locator(".prompt").inner_text() == "".join(EVIL)
    assert page.locator(".token > code").all_inner_texts() == [text.replace(" ", "␣") for text in EVIL]
    shown = page.locator("table").inner_text()
    assert all(text in shown for text in EVIL)
    assert page.asked == [] and page.wrong == []


def test_no_network_requests(page, tmp_path):
    "An explorer works from a single file."
    file = tmp_path / "page.html"
    file.write_text(f"<!doctype html><meta charset=utf-8>{PPOExplorer()._repr_html_()}", encoding="utf-8")
    page.goto(file.as_uri())
    assert found(page)[0] == 1.2 and page.asked == [file.as_uri()]


@pytest.mark.parametrize("width", [1100, 420])
def test_the_box_of_a_token_is_visible(page, width):
    "It opens on hover and on focus, with all four numbers, and within the page."
    tokens = Tokens("p", *("word " * 60).split(" "))
    page.set_viewport_size({"width": width, "height": 700})
    show(page, RolloutView(tokens, rollout(tokens), 0)._repr_html_())
    box = "token => getComputedStyle(token, '::after').content"
    third = page.locator(".token").nth(3)
    assert third.evaluate(box) == "none"
    third.hover()
    opened = third.evaluate(box)
    assert all(part in opened for part in ("word", "log-ratio -3", "value     -6", "advantage -12",
                                           "reward    -9")), opened
    page.mouse.move(0, 690)
    page.keyboard.press("Tab"); page.keyboard.press("Tab")
    assert "log-ratio -1" in page.locator(".token").nth(1).evaluate(box)
    for i in range(60):
        page.locator(".token").nth(i).focus()
        assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("width", [1100, 420])
def test_layout_follows_the_width(page, width):
    "Two columns on a wide page, two rows on a narrow one, never wider than the page."
    page.set_viewport_size({"width": width, "height": 700})
    show(page, PPOExplorer()._repr_html_())
    left, right = (page.locator(".half").nth(i).bounding_box() for i in range(2))
    assert (right["x"] > left["x"] + left["width"] if width > 1000
            else right["y"] > left["y"] + left["height"])
    assert page.evaluate("document.documentElement.scrollWidth") <= width
