"`python -m mlx_pretrain` is the command `mlx-pretrain`."
import sys

from mlx_pretrain.cli import main

if __name__ == "__main__": sys.exit(main())
