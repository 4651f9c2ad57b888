"`python sft.py …` is `mlx-pretrain sft …`."
import sys

from mlx_pretrain.cli import main

sys.exit(main(["sft", *sys.argv[1:]]))
