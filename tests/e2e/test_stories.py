"The story notebooks, run cell by cell in a browser: no error, no excessive output, and panels that finish."
import shutil

import pytest
from conftest import ROOT

STORIES = sorted(path.name for path in (ROOT / "nbs").glob("0*.ipynb"))
LAB = ["63_lab.ipynb", "61_views.ipynb", "64_playground.ipynb"]
# number of trainings in a panel
PANELS = {"02_pretrain.ipynb": 1, "04_ppo.ipynb": 1, "05_reward.ipynb": 1, "63_lab.ipynb": 1}


def test_all_stories_are_found(): assert len(STORIES) == 6


@pytest.mark.parametrize("name", STORIES + LAB)
def test_story(name, server, open_notebook):
    "Each cell runs, with at most a page of text and half a megabyte of output; each panel finishes."
    shutil.copytree(ROOT / "nbs", server.root / "nbs", dirs_exist_ok=True)
    nb = open_notebook(name=f"nbs/{name}")
    for i, kind in enumerate(nb.cells()):
        if kind != "code": continue
        nb.run(i, timeout=300)
        outputs = nb.outputs(i)
        assert not nb.errors(i), (i, nb.errors(i))
        assert nb.text(i).count("\n") < 60 and len(outputs) < 12, (i, len(outputs), nb.text(i)[-500:])
        assert len(str(outputs)) < 500_000, (i, len(str(outputs)))
    shown = [o.get("data", {}) for i, _ in enumerate(nb.cells()) for o in nb.outputs(i)]
    pictures = [data.get("text/plain", "") for data in shown if "image/png" in data]
    assert sum("".join(text).startswith("finished: step")
               for text in pictures) == PANELS.get(name, 0), pictures
