"A real JupyterLab on loopback and a real browser: one server, one browser, a new page for each test."
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import nbformat
import pytest
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "e2e"
# else playwright's own
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
SETTINGS = {"notification": {"fetchNews": "false", "checkForUpdates": False}}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    "JupyterLab with a home directory of its own, without the user's settings and extensions."
    def __init__(self, home, disabled=()):
        self.root, self.url, self.log = home / "root", f"http://127.0.0.1:{free_port()}", home / "lab.log"
        self.root.mkdir(parents=True)
        for name, values in SETTINGS.items():
            file = home / "settings/@jupyterlab/apputils-extension" / f"{name}.jupyterlab-settings"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(values))
        config = home / "config/labconfig/page_config.json"
        config.parent.mkdir(parents=True)
        config.write_text(json.dumps({"disabledExtensions": dict.fromkeys(disabled, True)}))
        env = os.environ | {"HOME": str(home), "JUPYTER_CONFIG_DIR": str(home / "config"),
                            "JUPYTER_DATA_DIR": str(home / "data"),
                            "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
                            "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
                            "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
                            "IPYTHONDIR": str(home / "ipython"),
                            "MPLBACKEND": "module://matplotlib_inline.backend_inline",
                            "PYTHONPATH": str(ROOT / "tests")}
        env.pop("IN_TEST", None)                                          # tests of the panel press buttons
        command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1",
                   f"--port={self.url.rpartition(':')[2]}", "--ServerApp.port_retries=0", "--allow-root",
                   f"--IdentityProvider.token={TOKEN}", f"--ServerApp.root_dir={self.root}",
                   "--LabApp.expose_app_in_browser=True", "--LabApp.extension_manager=readonly"]
        self.process = subprocess.Popen(command, env=env, cwd=self.root, stdout=open(self.log, "w"),
                                        stderr=subprocess.STDOUT)
        self._wait()

    def _wait(self):
        for _ in range(600):
            assert self.process.poll() is None, self.log.read_text()[-2000:]
            try: return urllib.request.urlopen(f"{self.url}/api/status?token={TOKEN}", timeout=2).read()
            except (urllib.error.URLError, OSError): time.sleep(0.1)
        raise AssertionError(f"JupyterLab did not start: {self.log.read_text()[-2000:]}")

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        try: self.process.wait(15)
        except subprocess.TimeoutExpired: self.process.kill(); self.process.wait()


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("jupyter"))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def browser():
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


class Notebook:
    "An open notebook: JupyterLab's commands run cells, its model has their outputs; the mouse moves sliders."
    def __init__(self, page, server, name): self.page, self.server, self.name = page, server, name

    def open(self, reset=True):
        "Load the page; `reset`: into an empty workspace."
        self.page.goto(f"{self.server.url}/lab/tree/{self.name}?token={TOKEN}{'&reset' * reset}",
                       wait_until="domcontentloaded")
        self.page.wait_for_function(
            "window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'",
            timeout=60_000,
        )
        self.page.wait_for_function("jupyterapp.shell.currentWidget.content.widgets.length > 0")

    def cells(self):
        return self.page.evaluate(
            "() => jupyterapp.shell.currentWidget.content.widgets.map(w => w.model.type)"
        )

    def send(self, i):
        "Run a cell, and do not wait."
        self.page.evaluate("""i => { const nb = jupyterapp.shell.currentWidget.content;
                                     nb.activeCellIndex = i;
                                     nb.deselectAll();
                                     jupyterapp.commands.execute('notebook:run-cell');
                                     return null }""", i)

    def wait(self, i, timeout=60):
        self.page.wait_for_function("""i => {
            const m = jupyterapp.shell.currentWidget.content.widgets[i].model;
            return m.executionCount !== null && m.executionState !== 'running' }""",
                                    arg=i, timeout=1000 * timeout)

    def run(self, i, timeout=60):
        self.page.evaluate(
            "i => { jupyterapp.shell.currentWidget.content.widgets[i].model.executionCount = null }", i
        )
        self.send(i)
        self.wait(i, timeout)
        return self.text(i)

    def command(self, name):
        self.page.evaluate("name => { jupyterapp.commands.execute(name); return null }", name)
    def outputs(self, i):
        return self.page.evaluate(
            "i => jupyterapp.shell.currentWidget.content.widgets[i].model.outputs?.toJSON() ?? []", i
        )
    def text(self, i): return "".join("".join(o["text"]) for o in self.outputs(i) if "text" in o)
    def pictures(self, i):
        return [o["data"]["image/png"] for o in self.outputs(i) if "image/png" in o.get("data", {})]
    def errors(self, i):
        return [f"{o['ename']}: {o['evalue']}" for o in self.outputs(i) if o["output_type"] == "error"]
    def button(self, name): return self.page.locator(".jupyter-button").filter(has_text=name).first
    def press(self, name): self.button(name).click()

    def drag(self, label, share):
        "Move a slider's handle with the mouse to a share of its range; returns the value that it shows."
        row = self.page.locator(".widget-slider").filter(has_text=label).first
        row.scroll_into_view_if_needed()
        handle, way = row.locator(".noUi-handle").bounding_box(), row.locator(".noUi-base").bounding_box()
        x = handle["x"] + handle["width"] / 2
        y = handle["y"] + handle["height"] / 2
        to = way["x"] + way["width"] * share
        self.page.mouse.move(x, y)
        self.page.mouse.down()
        for k in range(1, 7): self.page.mouse.move(x + (to - x) * k / 6, y); self.page.wait_for_timeout(30)
        self.page.mouse.up()
        return float(row.locator(".widget-readout").inner_text())

    def until(self, true, timeout=30):
        "Wait until a function returns something true, and return that."
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if found := true(): return found
            self.page.wait_for_timeout(100)
        raise AssertionError(f"not so within {timeout} s: {self.page.inner_text('.jp-Notebook')[-1500:]}")


def write_notebook(path, cells):
    nb = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3",
                                                           "language": "python"}})
    nb.cells = [nbformat.v4.new_code_cell(cell) for cell in cells]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, path)


@pytest.fixture
def open_notebook(server, browser, request):
    "A function that opens a notebook, or creates one of some cells. No request may leave loopback."
    context = browser.new_context(viewport={"width": 1300, "height": 1500})
    page, problems, outside, opened = context.new_page(), [], [], []
    page.on("pageerror", lambda error: problems.append(str(error)))

    def local(route):
        if route.request.url.startswith(("http://127.0.0.1:", "data:", "blob:")): return route.continue_()
        outside.append(route.request.url)
        return route.abort()
    page.route("**/*", local)
    page.on("websocket", lambda socket: socket.url.startswith("ws://127.0.0.1:")
            or outside.append(socket.url))

    def make(cells=None, name=None, on=server):
        name = name or f"{request.node.name}.ipynb"
        if cells: write_notebook(on.root / name, cells)
        opened.append(Notebook(page, on, name))
        opened[-1].open()
        return opened[-1]
    yield make
    shots = Path(os.environ.get("E2E_SHOTS", server.root))
    if getattr(request.node, "failed", False): page.screenshot(path=shots / f"{request.node.name}.png")
    # a kernel that is shut down while it sends a picture may break off in the middle of the message
    found = [*problems]
    for _ in opened[-1:]:
        page.evaluate("async () => { await jupyterapp.shell.currentWidget.sessionContext.shutdown() }")
    context.close()
    assert not outside, f"asked for from elsewhere: {outside}"
    assert not found, found


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.when == "call": item.failed = report.failed
    return report
