"The built site in a real browser without network access: pages load, and what needs no kernel works."
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

SITE = Path(__file__).resolve().parents[2] / "_docs"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PAGES = sorted(path.relative_to(SITE).as_posix()
               for path in SITE.rglob("*.html") if "vendor" not in path.parts)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


@pytest.fixture(scope="module")
def site():
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=SITE))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM,
                                    args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    "A page that records errors, missing files and requests to other machines."
    context = browser.new_context(viewport={"width": 1200, "height": 1000})
    page = context.new_page()
    page.wrong, page.outside = [], []
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.on("response", lambda response: response.status < 400 or "favicon" in response.url
            or page.wrong.append(response.url))

    def local(route):
        if route.request.url.startswith(("http://127.0.0.1:", "data:", "blob:")): return route.continue_()
        page.outside.append(route.request.url)
        return route.abort()
    page.route("**/*", local)
    yield page
    context.close()


def test_all_pages_exist():
    "A page for each notebook, tutorials included, and for each module."
    assert {"index.html", "model.html", "ppo.html", "lab.html", "views.html", "playground.html",
            "tutorials/chat.html"} <= {*PAGES}
    assert sum(page.startswith("api/") for page in PAGES) > 25


@pytest.mark.parametrize("name", PAGES)
def test_page(name, site, page):
    "Nothing is missing, no script fails, no other machine is contacted, and each picture has a size."
    page.goto(f"{site}/{name}", wait_until="load")
    page.wait_for_timeout(100)
    assert not page.wrong and not page.outside, (page.wrong, page.outside)
    assert page.evaluate(
        "[...document.images].every(image => image.loading === 'lazy' || image.naturalWidth > 0)"
    )
    assert len(page.inner_text("body")) > 200


def test_explorer_works_without_kernel(site, page):
    "On PPO's page the sliders change sentences and numbers: beyond clip_range the gradient is 0."
    page.goto(f"{site}/ppo.html")
    explorer = page.locator(".ppo-explorer").first
    explorer.scroll_into_view_if_needed()
    said = explorer.locator(".sentence").first
    ratio = explorer.locator("[name=ratio]")
    assert "gradient 0" in said.inner_text() and explorer.get_attribute("data-gradient") == "0"
    ratio.focus()
    page.keyboard.press("Home")
    for _ in range(110): page.keyboard.press("ArrowRight")                # ratio 1.10
    assert "gradient +1.00" in said.inner_text() and explorer.get_attribute("data-gradient") == "1"
    box = explorer.locator("[name=kl_coef]").bounding_box()
    before = explorer.get_attribute("data-best-kl")
    page.mouse.click(box["x"] + 0.8 * box["width"], box["y"] + box["height"] / 2)
    assert float(explorer.get_attribute("data-best-kl")) < float(before)


def test_inspector_shows_token_numbers(site, page):
    "Pointing at a token of a rollout shows its numbers."
    page.goto(f"{site}/ppo.html")
    token = page.locator(".ppo-rollout .token").last
    token.hover()
    opened = token.evaluate("token => getComputedStyle(token, '::after').content")
    assert all(name in opened for name in ("log-ratio", "value", "advantage", "reward"))
