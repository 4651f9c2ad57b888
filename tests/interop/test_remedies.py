"Commands of other programs that error messages propose work."
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_pretrain  # noqa: F401 (before MLX)
import mlx.core as mx
from mlx_pretrain.model import Llama, LlamaArgs
from mlx_pretrain.pretrained import PretrainedError, export, load
from mlx_pretrain.tokenizer import ByteTokenizer


def test_mlx_lm_adapters_are_fused_by_the_proposed_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
             "num_key_value_heads": 2}
    export(Llama(LlamaArgs(vocab_size=ByteTokenizer().vocab_size, head_dim=8, **sizes), 0), ByteTokenizer(),
           "base")
    Path("tuned").mkdir()
    about = {"model": "base", "fine_tune_type": "lora", "num_layers": 1,
             "lora_parameters": {"rank": 2, "scale": 3.0, "dropout": 0.0}}
    Path("tuned/adapter_config.json").write_text(json.dumps(about))
    prefix = "model.layers.0.self_attn.q_proj.lora_"
    mx.save_safetensors("tuned/adapters.safetensors",
                        {prefix + "a": mx.ones((16, 2)), prefix + "b": mx.ones((2, 16))})
    with pytest.raises(PretrainedError) as error: load("tuned")
    command, new = re.search("`(.*)` and give (.*)$", str(error.value)).groups()
    # as in an activated virtual environment
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    subprocess.run(command, shell=True, check=True, capture_output=True)
    q, before = (load(path).model.model.layers[0].self_attn.q_proj.weight for path in (new, "base"))
    assert mx.allclose(q - before, mx.full((16, 16), 6.0), atol=1e-4)      # 3 · (1·1 + 1·1)
