"The user guide's SFT section, followed to the letter in an empty directory: its data, its YAML, its commands."
# ruff: noqa: E501, W293 (quoted to the letter)
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_pretrain  # noqa: F401 (before MLX)
from mlx_pretrain.pretrained import load
from mlx_pretrain.run import checkpoints, read_metadata, read_metrics

ROOT = Path(__file__).parents[1]

DATA = r'''{"instruction": "Explain how photosynthesis works", "response": "Photosynthesis is the process by which plants..."}
{"instruction": "What are the key differences between Python and JavaScript?", "response": "Python and JavaScript differ in several key ways..."}
'''

POEM = r'''{"instruction": "Write a poem about machine learning", "response": "Silicon minds in constant flow,\nPatterns emerge as data grows..."}
'''

CONFIG = r'''name: "Llama-2M-SFT"
overwrite: true
data:
  input_file: "sft_data.jsonl"
  validation_file: "sft_val.jsonl"
  tokenizer_path: "runs/Llama (2M)/tokenizer"
  
  # SFT specific configuration
  prompt_format: "### Instruction:\n{instruction}\n\n### Response:"
  response_format: "{response}"
  system_prompt: "You are a helpful, harmless, and honest AI assistant."
  input_field: "instruction"
  output_field: "response"
  
  preprocessing:
    max_context_size: 1024
    
model:
  architecture: "llama"
  dimensions:
    hidden_size: 2048
    intermediate_size: 4096
    num_layers: 12
  # Additional model parameters...

training:
  epochs: 3
  hyperparameters:
    batch_size: 8
    learning_rate: 5.0e-5
    weight_decay: 0.01
    gradient_clip: 1.0
  # Additional training parameters...
'''

PRETRAIN = '''name: "Llama (2M)"
data: {input_file: text.jsonl, preprocessing: {max_context_size: 64}}
model: {dimensions: {hidden_size: 32, num_layers: 2}}
training: {hyperparameters: {iters: 3, batch_size: 2}}
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A directory after the guide's commands."
    place = tmp_path_factory.mktemp("guide")
    for name in ("train.py", "sft.py"): shutil.copy(ROOT / name, place)
    texts = [json.dumps({"text": f"Silicon minds in constant flow, {i} times."}) + "\n" for i in range(50)]
    (place / "text.jsonl").write_text("".join(texts))
    (place / "sft_data.jsonl").write_text(DATA)
    (place / "sft_val.jsonl").write_text(POEM)
    (place / "model-config.yaml").write_text(PRETRAIN)
    (place / "sft-config.yaml").write_text(CONFIG)
    return place


def run(place, *words):
    done = subprocess.run([sys.executable, *words], cwd=place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_the_guide(place):
    run(place, "train.py", "--config", "model-config.yaml")
    said = run(place, "sft.py", "--config", "sft-config.yaml", "--pretrained_model", "runs/Llama (2M)")
    path = place / "runs" / "Llama-2M-SFT"
    assert '"model.dimensions.hidden_size" is 2048, the pretrained model has 32; "model.dimensions.intermediate_size" is 4096' in said
    assert '"model.dimensions.num_layers" is 12, the pretrained model has 2' in said and said.count("The pretrained model counts.") == 1
    assert "2 rows, 2 kept" in said
    assert [row["step"] for row in read_metrics(path)] == [1, 3] and "val_loss" in read_metrics(path)[-1]
    known = read_metadata(path)
    assert (known["outcome"], known["total_steps"], known["parameters"]) == ("finished", 3, read_metadata(path.with_name("Llama (2M)"))["parameters"])
    assert checkpoints(path)[-1].name == "step_000003" and "ended: finished" in (path / "logs" / "log.txt").read_text()
    ask = load(path).format.ask("Write a poem about machine learning")
    assert ask == "You are a helpful, harmless, and honest AI assistant.\n\n### Instruction:\nWrite a poem about machine learning\n\n### Response:"
    assert run(place, "-m", "mlx_pretrain", "generate", "--run", "Llama-2M-SFT", "--instruction", "Write a poem", "--max_new_tokens", "5")
    run(place, "-m", "mlx_pretrain", "sft", "--config", "sft-config.yaml", "--pretrained_model", "runs/Llama (2M)")   # overwrite: true
