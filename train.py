"`python train.py …` is `mlx-pretrain train …`."
import sys

from mlx_pretrain.__main__ import main

sys.exit(main(["train", *sys.argv[1:]]))
