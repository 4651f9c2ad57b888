__version__ = "0.1.0"
import sys
import warnings
from importlib import import_module

from mlx_pretrain.blas import RefuseMLX, load_blas, missing_backend

if problem := missing_backend():
    sys.meta_path.insert(0, RefuseMLX(problem))
    # A program raises this when it imports MLX; at a prompt or in `python -c` that may be much later.
    if not hasattr(sys.modules["__main__"], "__file__") and sys.argv[:1] != ["-m"]:
        warnings.warn(problem, stacklevel=2)
else: load_blas()


def __getattr__(name):
    "`RewardModel`, the base class of rewards; MLX is imported only when it is accessed."
    if name != "RewardModel": raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module("mlx_pretrain.core").RewardModel
