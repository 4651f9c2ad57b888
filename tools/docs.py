"""Build the site in _docs/ and README.md from the executed notebooks, without Quarto.

nbdev's processors turn the notebooks in _exec/ into pages with documentation of exported symbols; smalldocs
renders them.
"""
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import yaml
from nbdev.config import get_config
from nbdev.serve import proc_nbs
from notebooks import EXEC, NBS, README, ROOT, execute, notebooks, readme

PAGES, PROC, SITE = ROOT / "_pages", ROOT / "_proc", ROOT / "_docs"
CDN = "https://cdn.jsdelivr.net/npm"
WIDGETS = "@jupyter-widgets/html-manager@1.0.14"
VIEW, STATE = "application/vnd.jupyter.widget-view+json", "application/vnd.jupyter.widget-state+json"
NUMBER = re.compile(r"^\d+[a-z]*_")  # 00_model.ipynb is page model.html, as nbdev has it
MODULE = re.compile(r"^#\|\s*default_exp\s+(\S+)", re.MULTILINE)
EXPORT = re.compile(r"^#\|\s*export\s*$", re.MULTILINE)
NOTEBOOK_LINK = re.compile(r"(\]\((?:\.\./|\w+/)*)\d+[a-z]*_(\w+\.ipynb)")
WEB_FONTS = re.compile(r"@import\s*(?:url\()?[\"']?https://fonts[^;]*;")


def page_path(name):
    "The path of a notebook's page."
    return name.with_name(NUMBER.sub("", name.name))


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def is_imports(source):
    "Does a cell contain imports only?"
    return all(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.parse(source).body)


def with_source(nb):
    """A notebook whose exported code stays on its page, except imports; nbdev would keep only signatures.

    A hidden cell imports the module first: nbdev documents a function at its cell, before later types.
    """
    cells = []
    for cell in nb["cells"]:
        source = "".join(cell["source"])
        exported = cell["cell_type"] == "code" and EXPORT.search(source)
        if exported and not is_imports(source): source = EXPORT.sub("#| exports", source, count=1)
        cells.append(cell | {"source": source})
        if module := MODULE.search(source):
            cells.append(cell | {"source": f"#| hide\nfrom mlx_pretrain.{module[1]} import *",
                                 "id": "the-module"})
    return nb | {"cells": cells}


def plain(nb, up, host):
    "nbdev's page as a plain notebook: links relative to the site, widgets as HTML."
    state, used = nb["metadata"].get("widgets", {}).get(STATE, {}).get("state", {}), False
    for cell in nb["cells"]:
        source = "".join(cell["source"]).replace(host, up)
        if cell["cell_type"] == "raw": source = re.sub(r"(?m)^output-file:.*\n", "", source)
        if cell["cell_type"] == "markdown": source = NOTEBOOK_LINK.sub(r"\1\2", source)
        cell["source"] = source
        for output in cell.get("outputs", []):
            view = output.get("data", {}).get(VIEW)
            if view and view["model_id"] in state:
                used = True
                output["data"] = {"text/html": f'<script type="{VIEW}">{json.dumps(view)}</script>'}
    if used:
        nb["cells"].append({"cell_type": "markdown", "metadata": {},
                            "source": widget_manager(nb["metadata"]["widgets"][STATE])})
    return json.loads(json.dumps(nb).replace(host, up))  # what documented symbols link to is in their outputs


def widget_manager(state):
    "The HTML that shows a page's widgets without a kernel."
    data = json.dumps(state).replace("</", "<\\/")
    scripts = (f'<script type="{STATE}">{data}</script>\n'
               f'<script src="{CDN}/{WIDGETS}/dist/embed.js"></script>')
    return f"```{{=html}}\n{scripts}\n```\n"


def stage():
    "Fill `_proc/` with the renderer's input: pages, other files, and the site's settings."
    cfg = get_config()
    shutil.rmtree(PAGES, ignore_errors=True)
    for name in notebooks():
        write(PAGES / name, json.dumps(with_source(json.loads((EXEC / name).read_text(encoding="utf-8")))))
    proc_nbs(PAGES.name, force=True)
    for name in notebooks():
        nb = json.loads((PROC / name).read_text(encoding="utf-8"))
        (PROC / name).unlink()
        write(PROC / page_path(name),
              json.dumps(plain(nb, "../" * (len(name.parts) - 1), f"{cfg.doc_host}{cfg.doc_baseurl}/")))
    for path in NBS.rglob("*"):
        name = path.relative_to(NBS)
        if (
            path.is_file()
            and path.suffix not in (".ipynb", ".py")
            and not any(part.startswith(".") for part in name.parts)
        ):
            (PROC / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, PROC / name)
    website = {"title": cfg.title, "description": cfg.description, "site-url": cfg.doc_host + cfg.doc_baseurl,
               "repo-url": cfg.git_url, "repo-branch": cfg.branch}
    write(PROC / "nbdev.yml", yaml.safe_dump({"project": {"output-dir": SITE.name}, "website": website},
                                             sort_keys=False))


GROUPS = {"1": "Foundations", "2": "Text to tokens", "3": "Models", "4": "Training", "5": "Rewards and RL",
          "6": "Watching", "7": "Commands"}  # of the machinery, by the first digit


def sidebar():
    "The notebooks in reading order, then a page for each module."
    names = [name for name in notebooks() if name.name != "index.ipynb"]
    sections = {
        "The story": [name for name in names if name.name.startswith("0") and len(name.parts) == 1],
        "Tutorials": [name for name in names if len(name.parts) > 1],
        **{title: [name for name in names if name.name.startswith(decade) and len(name.parts) == 1]
           for decade, title in GROUPS.items()},
    }
    contents = ["index.ipynb"]
    contents += [{"section": title, "contents": [page_path(name).as_posix() for name in part]}
                 for title, part in sections.items() if part]
    contents += [{"section": "API reference",
                  "contents": sorted(f"api/{path.name}" for path in (PROC / "api").glob("*.qmd"))}]
    write(PROC / "sidebar.yml", yaml.safe_dump({"website": {"sidebar": {"contents": contents}}},
                                               sort_keys=False))


def smalldocs(*args):
    subprocess.run([Path(sys.executable).with_name("smalldocs"), *args], check=True)


def vendor(package, folder):
    "Copy the `dist/` of an npm package into the site, if npm can get it."
    with tempfile.TemporaryDirectory() as temporary:
        done = subprocess.run(["npm", "pack", "--silent", package], cwd=temporary, capture_output=True,
                              text=True, check=False)
        if done.returncode: return False
        with tarfile.open(Path(temporary, done.stdout.split()[-1])) as archive:
            archive.extractall(temporary, filter="data")
        shutil.copytree(Path(temporary, "package", "dist"), folder,
                        ignore=shutil.ignore_patterns("*.map", "*.mjs", "README*"))
    return True


def localise():
    "Serve KaTeX and the widget manager from the site, if npm can fetch them; drop the theme's web fonts."
    for path in SITE.rglob("*.css"): write(path, WEB_FONTS.sub("", path.read_text(encoding="utf-8")))
    pages = {path: path.read_text(encoding="utf-8") for path in SITE.rglob("*.html")}
    packages = {found for text in pages.values()
                for found in re.findall(rf"{CDN}/((?:@[\w-]+/)?[\w-]+@[\d.]+)/dist/(?:katex|embed)", text)}
    if packages and not shutil.which("npm"):
        return print("npm is not installed: formulas and widgets will load from a CDN")
    for package in sorted(packages):
        folder = "vendor/" + package.rpartition("@")[0].rpartition("/")[2]
        if not vendor(package, SITE / folder):
            print(f"npm could not get {package}: it will load from a CDN")
            continue
        for path in pages:
            up = "../" * (len(path.relative_to(SITE).parts) - 1)
            pages[path] = pages[path].replace(f"{CDN}/{package}/dist", up + folder)
    for path, text in pages.items(): write(path, text)


def main():
    os.chdir(ROOT)
    execute(only_stale=True)
    write(README, readme())
    stage()
    smalldocs("api", "build", "--dir", str(PROC))
    sidebar()
    smalldocs("render", "--quiet", str(PROC))
    shutil.rmtree(SITE, ignore_errors=True)
    shutil.move(PROC / SITE.name, SITE)
    localise()
    print(f"site: {SITE / 'index.html'}")


if __name__ == "__main__": main()
