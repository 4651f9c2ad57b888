"Helpers that several notebooks use in their examples and tests; not part of the library."
import json
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten


def write_rows(path, rows):
    "Write a JSON Lines file; returns its path as a string, as a configuration has it."
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    Path(path).write_text("".join(lines), encoding="utf-8")
    return str(path)


def same_arrays(a, b):
    "Do two trees of arrays have the same names and the same bits?"
    pairs = [*zip(sorted(tree_flatten(a)), sorted(tree_flatten(b)), strict=True)]
    return bool(pairs) and all(name == other and mx.array_equal(x, y).item()
                               for (name, x), (other, y) in pairs)
