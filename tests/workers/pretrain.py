"Pretrain with some configurations: `pretrain.py FOLDER NAME…`, each in FOLDER/NAME.json."
import sys
from pathlib import Path

import mlx_pretrain  # noqa: F401 (before MLX)
from mlx_pretrain.pretrain import PretrainConfig, pretrain

folder = Path(sys.argv[1])
for name in sys.argv[2:]:
    pretrain(PretrainConfig.model_validate_json((folder / f"{name}.json").read_text()), folder / "runs")
