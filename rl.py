"`python rl.py …` is `mlx-pretrain rl …`."
import sys

from mlx_pretrain.__main__ import main

sys.exit(main(["rl", *sys.argv[1:]]))
