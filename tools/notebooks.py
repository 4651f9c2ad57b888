"""Run the notebooks, export the library from them, and check that the two agree.

    python tools/notebooks.py execute    run the named notebooks (default: all but the tutorials) into _exec/
    python tools/notebooks.py export     clean the notebooks, write mlx_pretrain/ and README.md
    python tools/notebooks.py sync       check that `export` would change nothing
"""
import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NBS, LIB, EXEC, README = (ROOT / name for name in ("nbs", "mlx_pretrain", "_exec", "README.md"))
TIMEOUT = 600  # seconds per notebook
WORKERS = 2  # notebooks in parallel
BY_HAND = ("__init__.py", "__main__.py")  # modules without a notebook
NOT_RUN = re.compile(r"^#\|\s*eval:\s*false", re.MULTILINE)
HIDDEN = re.compile(r"^#\|\s*(hide|default_exp|exporti?|exports)\b", re.MULTILINE)
DIRECTIVE = re.compile(r"^#\|.*\n?", re.MULTILINE)


def notebooks(folder=NBS):
    "Paths of the notebooks below `folder`, relative to it; names that start with `.` or `_` are ignored."
    found = (path.relative_to(folder) for path in folder.rglob("*.ipynb"))
    return sorted(path for path in found if not any(part[0] in "._" for part in path.parts))


# Executing


def key_of(name):
    "A hash of everything that a notebook's outputs depend on."
    digest = hashlib.sha256(f"{sys.version} mlx {version('mlx')}".encode())
    for path in (
        NBS / name,
        ROOT / "settings.ini",
        *sorted(NBS.glob("*.py")),
        *sorted(LIB.rglob("*.py")),
        *sorted((ROOT / "configs").rglob("*.yaml")),
    ):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def is_fresh(name):
    "Is the notebook in `_exec/` up to date?"
    executed = EXEC / name
    if not executed.exists(): return False
    return json.loads(executed.read_text(encoding="utf-8"))["metadata"].get("key") == key_of(name)


def run_one(name):
    "Run a notebook in a kernel of this Python, and write it with outputs and widget state."
    import nbformat
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpecManager
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, DeadKernelError

    key, nb = key_of(name), nbformat.read(NBS / name, 4)
    for cell in nb.cells:
        if NOT_RUN.search(cell.source): cell.metadata["tags"] = ["skip-execution"]
    # without folders to search, "python3" is the kernel of sys.executable, whatever else is installed
    kernel = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    client = NotebookClient(nb, kernel, timeout=TIMEOUT,
                            resources={"metadata": {"path": str((NBS / name).parent)}},
                            store_widget_state=True, coalesce_streams=True, record_timing=False,
                            extra_arguments=["--log-level=40"])
    try: client.execute()
    except (CellExecutionError, DeadKernelError) as error: sys.exit(str(error))
    for cell in nb.cells: cell.metadata.pop("tags", None)
    nb.metadata["key"] = key
    (EXEC / name).parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, EXEC / name)


def run_in_child(name, workers):
    "Run a notebook in a process with a timeout: the seconds it took, and its error."
    start, threads = time.perf_counter(), str(max(1, (os.cpu_count() or 1) // workers))
    env = os.environ | {"IN_TEST": "1", "MKL_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
    command = [sys.executable, __file__, "run-one", str(name)]
    try: done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired: return TIMEOUT, f"stopped after {TIMEOUT} seconds"
    problem = (done.stderr or f"exit status {done.returncode}") if done.returncode else ""
    return time.perf_counter() - start, problem


def execute(names=None, only_stale=False):
    "Run notebooks into `_exec/`, print one line each, and exit with the tracebacks of failures."
    names = [name for name in names or notebooks() if not (only_stale and is_fresh(name))]
    for name in notebooks(EXEC):
        if name in names or not (NBS / name).exists(): (EXEC / name).unlink()
    failures, workers = {}, min(WORKERS, len(names)) or 1
    with ThreadPoolExecutor(workers) as pool:
        try:
            for name, (seconds, problem) in zip(
                names, pool.map(lambda name: run_in_child(name, workers), names), strict=True
            ):
                print(f"{'FAILED' if problem else 'ok':6} {seconds:6.1f} s  nbs/{name}", flush=True)
                if problem: failures[name] = problem
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            sys.exit("stopped")
    if failures: sys.exit("".join(f"\n=== nbs/{name}\n{problem}\n" for name, problem in failures.items()))


# The README


def cells_of(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def readme():
    "The text of README.md: the index's visible cells, with outputs, and links from the repository's root."
    cells = cells_of(NBS / "index.ipynb")
    if any(cell["cell_type"] == "code" and not NOT_RUN.search("".join(cell["source"])) for cell in cells):
        execute([Path("index.ipynb")], only_stale=True)
        cells = cells_of(EXEC / "index.ipynb")
    parts = []
    for cell in cells:
        source = "".join(cell["source"]).strip()
        if HIDDEN.search(source): continue
        if cell["cell_type"] == "markdown":
            parts.append(re.sub(r"(\]\()(?![a-z]+:|#|/)", r"\1nbs/", source).replace("](nbs/../", "]("))
        if cell["cell_type"] == "code":
            parts += [f"```python\n{DIRECTIVE.sub('', source)}\n```", *map(as_text, cell["outputs"])]
    return "\n\n".join(part for part in parts if part) + "\n"


def as_text(output):
    "A cell's output as an indented block; pictures are left out."
    if "name" in output: text = output["text"] if output["name"] == "stdout" else ""
    else: text = output["data"].get("text/plain", "")
    return "\n".join(f"    {line}".rstrip() for line in "".join(text).rstrip().splitlines())


# Export and sync


def nbdev(command, root):
    "Run one of nbdev's commands in `root`; `IN_TEST` would keep it from writing its index."
    env = {name: value for name, value in os.environ.items() if name != "IN_TEST"}
    subprocess.run([Path(sys.executable).with_name(f"nbdev_{command}")], cwd=root, env=env, check=True)


def export():
    "Clean the notebooks, and write the library and the README from them."
    nbdev("clean", ROOT)
    nbdev("export", ROOT)
    README.write_text(readme(), encoding="utf-8")


def stored_outputs(name):
    "Content of a notebook that should not be committed: outputs, counts and widget state."
    nb = json.loads((NBS / name).read_text(encoding="utf-8"))
    if "widgets" in nb["metadata"]: yield f"nbs/{name} holds widget state"
    if any(cell.get("outputs") or cell.get("execution_count") for cell in nb["cells"]):
        yield f"nbs/{name} holds outputs"


def hashes(root):
    files = (*(root / "nbs").rglob("*.ipynb"), *(root / "mlx_pretrain").rglob("*.py"))
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def out_of_step():
    "Files that `export` would change, add or orphan; tried on a copy."
    with tempfile.TemporaryDirectory(prefix="sync") as folder:
        copy = Path(folder, "copy")
        for source in (NBS, LIB):
            shutil.copytree(source, copy / source.name, ignore=shutil.ignore_patterns(".*", "__pycache__"))
        for name in ("settings.ini", "pyproject.toml"): shutil.copy(ROOT / name, copy)
        before = hashes(copy)
        for module in (copy / LIB.name).rglob("*.py"):
            if module.name not in BY_HAND: module.unlink()  # modules without a notebook do not come back
        nbdev("clean", copy)
        nbdev("export", copy)
        after = hashes(copy)
    for name in sorted(before.keys() | after.keys()):
        if name not in before: yield f"{name} is missing"
        elif name not in after: yield f"{name} has no notebook"
        elif before[name] != after[name]:
            yield f"{name} {'differs from its notebook' if name.endswith('.py') else 'is not clean'}"


def sync():
    "Exit with a list of everything that is out of sync."
    problems = [problem for name in notebooks() for problem in stored_outputs(name)] + [*out_of_step()]
    if not README.exists() or README.read_text(encoding="utf-8") != readme():
        problems.append("README.md differs from nbs/index.ipynb")
    if problems: sys.exit("\n".join(problems) + "\nOut of sync: run `python tools/notebooks.py export`.")
    print(f"in sync: {len(notebooks())} notebooks, mlx_pretrain/ and README.md")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["execute", "sync", "export", "run-one"])
    parser.add_argument("names", nargs="*", type=Path, help="notebooks, relative to nbs/ (default: all)")
    args = parser.parse_args()
    if args.command == "execute":
        execute(args.names or [name for name in notebooks() if len(name.parts) == 1])
    elif args.command == "run-one": run_one(args.names[0])
    else: {"sync": sync, "export": export}[args.command]()


if __name__ == "__main__": main()
