"Importing a stage must be light: no plotting, no widgets, no torch, and hardly slower than MLX alone."
import json
import subprocess
import sys

import pytest

HEAVY = {"matplotlib", "ipywidgets", "transformers", "torch", "pandas", "IPython", "sentencepiece", "tqdm",
         "tyro", "fastcore", "nbdev"}
MODULES = ["model", "tokenizer", "data", "prompt", "stage", "pretrain", "sft", "generate", "pretrained",
           "trainer", "optim", "run", "config", "core", "ops", "jsonl", "user_code", "token_cache"]


def loaded_and_seconds(statement):
    "Top-level modules loaded after a statement, and the CPU seconds of the process."
    report = "print(json.dumps([sorted({m.split('.')[0] for m in sys.modules}), time.process_time()]))"
    code = f"import json, sys, time\n{statement}\n{report}"
    return json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                                     check=True).stdout)


@pytest.mark.parametrize("module", MODULES)
def test_import_is_light(module):
    assert not HEAVY & set(loaded_and_seconds(f"import mlx_pretrain.{module}")[0])


def test_heavy_import_is_detected():
    assert HEAVY & set(loaded_and_seconds("import mlx_pretrain.plot, matplotlib")[0])


@pytest.mark.parametrize("word", ["--version", "--help"])
def test_version_and_help_need_no_mlx(word):
    "They use the standard library only."
    code = f"from mlx_pretrain.__main__ import main; assert main(['{word}']) == 0"
    report = "import sys; sys.stderr.write(' '.join(sorted({m.split('.')[0] for m in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True,
                          check=True)
    assert done.stdout and not (HEAVY | {"mlx", "numpy", "pydantic", "yaml",
                                         "tokenizers"}) & set(done.stderr.split())


def test_reward_model_can_be_imported_from_package_and_reward():
    "The package imports MLX only when `RewardModel` is used."
    assert "mlx" not in loaded_and_seconds("import mlx_pretrain")[0]
    assert "mlx" in loaded_and_seconds("from mlx_pretrain import RewardModel")[0]
    from mlx_pretrain import RewardModel, core, reward
    assert RewardModel is core.RewardModel is reward.RewardModel and "RewardModel" in reward.__all__
    with pytest.raises(ImportError): from mlx_pretrain import Rewardmodel  # noqa: F401


def test_import_time_is_close_to_mlx():
    "CPU time, the best of three, so that other programs do not matter."
    ours = min(loaded_and_seconds("import mlx_pretrain.pretrain")[1] for _ in range(3))
    mlx = min(loaded_and_seconds("import mlx.core, mlx.nn, mlx.optimizers, numpy")[1] for _ in range(3))
    assert ours - mlx < 0.65  # about 0.47 on a slow machine, most of it pydantic
