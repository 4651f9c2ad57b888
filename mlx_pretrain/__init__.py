__version__ = "0.1.0"
from mlx_pretrain.blas import load_blas

load_blas()
