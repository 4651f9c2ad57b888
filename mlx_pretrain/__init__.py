__version__ = "0.1.0"
import sys
import warnings
from importlib import import_module

from mlx_pretrain.blas import RefuseMLX, load_blas, missing_backend

if problem := missing_backend():
    sys.meta_path.insert(0, RefuseMLX(problem))
    # In a program, importing MLX says it; at a prompt or with `python -c`, nothing might be imported for a long time.
    if not hasattr(sys.modules["__main__"], "__file__") and sys.argv[:1] != ["-m"]: warnings.warn(problem, stacklevel=2)
else: load_blas()


def __getattr__(name):
    "`RewardModel`, what a reward of your own subclasses, without importing MLX until somebody asks for it."
    if name != "RewardModel": raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module("mlx_pretrain.core").RewardModel
