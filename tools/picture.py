"""Make nbs/images/panel.png, the README's picture: PPO in a real JupyterLab, with kl_coef dragged.

    make e2e && .venv/bin/python tools/picture.py      (the first installs the browser)
"""
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "e2e"))
from conftest import CHROMIUM, QUIET, Notebook, Server, write_notebook  # noqa: E402

SETUP = """import mlx_pretrain
from toys import task
from mlx_pretrain.lab import Live
def count_a(prompt, response): return response.count("a") / 8
trainer = task(count_a, steps=450, batch=64, lr=3e-3, response_length=8, kl_coef=0.08, guards="warn")"""
START = "live = Live(trainer, root=None)\nlive.start()"
ASK = "print(trainer.steps_done)"


def main():
    out = ROOT / "nbs" / "images" / "panel.png"
    out.parent.mkdir(exist_ok=True)
    server = Server(Path(tempfile.mkdtemp()))
    try:
        write_notebook(server.root / "panel.ipynb", [SETUP, START, ASK])
        with sync_playwright() as p:
            browser = p.chromium.launch(executable_path=CHROMIUM, args=QUIET)
            page = browser.new_context(viewport={"width": 1240, "height": 1100},
                                       device_scale_factor=1.5).new_page()
            notebook = Notebook(page, server, "panel.ipynb")
            notebook.open()
            page.evaluate("jupyterapp.commands.execute('application:toggle-left-area')")
            for i in (0, 1): notebook.run(i)
            for step, share in ((130, 0.04), (260, 0.35), (400, None)):
                notebook.until(lambda step=step: int(notebook.run(2)) > step, timeout=120)
                if share: notebook.drag("kl_coef", share)
                if step == 260: notebook.press("Sample")
            notebook.press("Pause")                                       # draws the picture
            notebook.page.wait_for_timeout(1000)
            page.locator(".jp-Notebook .jp-Cell").nth(1).locator(".jp-OutputArea").first.screenshot(path=out)
            browser.close()
    finally: server.stop()
    print(f"{out}: {out.stat().st_size // 1024} kB")


if __name__ == "__main__": main()
