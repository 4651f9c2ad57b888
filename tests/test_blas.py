"""The fast BLAS; every case runs in a new process, as import order is a property of a process."""
import os
import subprocess
import sys

import numpy as np
import pytest

GRADIENT = """
import sys
import mlx_pretrain
import mlx.core as mx
import mlx.nn as nn
import numpy as np

def loss(parameters, x, y):
    hidden = nn.silu(x @ parameters["a"])
    return nn.losses.cross_entropy(hidden @ parameters["b"], y, reduction="mean")

x = mx.random.normal((64, 96), key=mx.random.key(0))
y = mx.random.randint(0, 200, (64,), key=mx.random.key(1))
parameters = {"a": mx.random.normal((96, 128), key=mx.random.key(2)) * 0.1,
              "b": mx.random.normal((128, 200), key=mx.random.key(3)) * 0.1}
value, gradients = mx.value_and_grad(loss)(parameters, x, y)
np.savez(sys.argv[1], loss=value, **gradients)
"""

LOADED = """
import mlx_pretrain
import mlx.core
maps = open("/proc/self/maps").read()
print(any(name in maps for name in ("libmkl_rt", "libopenblas")))
"""


def fresh(code, *args, blas=""):
    env = os.environ | {"MLX_PRETRAIN_BLAS": str(blas)}
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], env=env, capture_output=True,
                          text=True, timeout=120)


def one_warning(done):
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Warning:") == 1, done.stderr
    return done.stderr


def silent(done):
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout.strip()


def test_import_is_silent_and_without_mlx():
    assert silent(fresh("import sys, mlx_pretrain; print('mlx.core' in sys.modules)")) == "False"


def test_silent_outside_linux():
    code = (
        "import sys; sys.platform = 'darwin'; import mlx.core, mlx_pretrain; print(mlx_pretrain.load_blas())"
    )
    assert silent(fresh(code)) == "None"


@pytest.mark.linux
def test_fast_library_is_loaded():
    assert silent(fresh(LOADED)) == "True"


@pytest.mark.linux
def test_opt_out():
    assert silent(fresh(LOADED, blas="off")) == "False"


@pytest.mark.linux
def test_opt_out_is_silent_after_mlx():
    assert silent(fresh("import mlx.core, mlx_pretrain; print(mlx_pretrain.load_blas())",
                        blas="off")) == "None"


@pytest.mark.linux
def test_named_library_is_used():
    path = silent(fresh("import mlx_pretrain; print(mlx_pretrain.load_blas())"))
    assert silent(fresh("import mlx_pretrain; print(mlx_pretrain.load_blas())", blas=path)) == path


@pytest.mark.linux
def test_mlx_imported_first_warns():
    message = one_warning(fresh("import mlx.core\nimport mlx_pretrain\nmlx_pretrain.load_blas()"))
    assert "import mlx_pretrain first" in message
    assert "<string>:2" in message  # the user's own line


@pytest.mark.linux
def test_second_call_after_mlx_is_silent():
    assert (
        silent(fresh("import mlx_pretrain, mlx.core; print(mlx_pretrain.load_blas() is not None)")) == "True"
    )


@pytest.mark.linux
def test_no_library_found_warns():
    code = ("import ctypes\ndef refuse(*args, **kwargs): raise OSError('not here')\n"
            "ctypes.CDLL = refuse\nimport mlx_pretrain, mlx.core")
    assert "install" in one_warning(fresh(code + "\nmlx_pretrain.load_blas()"))


@pytest.mark.linux
@pytest.mark.parametrize("kind", ["missing", "text", "no BLAS"])
def test_bad_path_warns(kind, tmp_path):
    (tmp_path / "text").write_text("not a library")
    path = "libm.so.6" if kind == "no BLAS" else tmp_path / kind
    message = one_warning(fresh("import mlx_pretrain, mlx.core; mlx_pretrain.load_blas()", blas=path))
    assert str(path) in message and "MLX_PRETRAIN_BLAS" in message


@pytest.mark.linux
def test_gradients_agree_with_stock(tmp_path):
    for name, blas in (("fast", ""), ("stock", "off")):
        silent(fresh(GRADIENT, tmp_path / f"{name}.npz", blas=blas))
    fast, stock = (np.load(tmp_path / f"{name}.npz") for name in ("fast", "stock"))
    for name in stock.files:
        assert np.abs(fast[name] - stock[name]).max() <= 1e-5 * np.abs(stock[name]).max(), name
    # two libraries, not the same one twice
    assert any((fast[name] != stock[name]).any() for name in ("a", "b"))
