"`python sft.py …` is `mlx-pretrain sft …`."
import sys

from mlx_pretrain.__main__ import main

sys.exit(main(["sft", *sys.argv[1:]]))
