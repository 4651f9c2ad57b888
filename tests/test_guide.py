"The user guide, followed to the letter in an empty directory: its data, its YAML, its commands, its reward class."
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

RL_ROW = r'''{
  "instruction": "Write a poem about machine learning",
  "response": "Machines learning day by day...",
  "reward": 0.8
}
'''

RL_CONFIG = r'''data:
  # RL specific configuration
  prompt_format: "### Instruction:\n{instruction}\n\n### Response:"
  response_format: "{response}"
  reward_field: "reward"
  
  # PPO specific parameters
  ppo_epochs: 4
  ppo_mini_batch_size: 8
  kl_coef: 0.1
  clip_range: 0.2
'''

CUSTOM_REWARD = '''class CustomRewardModel(RewardModel):
    def compute_reward(self, prompts, responses):
        # Implement your custom reward logic here
        return rewards
'''

PRETRAIN = '''name: "Llama (2M)"
data: {input_file: text.jsonl, preprocessing: {max_context_size: 64}}
model: {dimensions: {hidden_size: 32, num_layers: 2}}
training: {hyperparameters: {iters: 3, batch_size: 2}}
'''

PAIRS = '''data: {input_file: pairs.jsonl, validation_file: pairs.jsonl, response_length: 8, normalization_samples: 8}
training: {hyperparameters: {iters: 3, batch_size: 4}}
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A directory after the guide's commands were run."
    place = tmp_path_factory.mktemp("guide")
    for name in ("train.py", "sft.py", "rl.py"): shutil.copy(ROOT / name, place)
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


def test_guide(place):
    run(place, "train.py", "--config", "model-config.yaml")
    said = run(place, "sft.py", "--config", "sft-config.yaml", "--pretrained_model", "runs/Llama (2M)")
    path = place / "runs" / "Llama-2M-SFT"
    assert (
        '"model.dimensions.hidden_size" is 2048, the pretrained model has 32; "model.dimensions.intermediate_size" is 4096'
        in said
    )
    assert (
        '"model.dimensions.num_layers" is 12, the pretrained model has 2' in said
        and said.count("The pretrained model's values are used.") == 1
    )
    assert "2 rows, 2 kept" in said
    assert [row["step"] for row in read_metrics(path)] == [1, 3] and "val_loss" in read_metrics(path)[-1]
    known = read_metadata(path)
    assert (known["outcome"], known["total_steps"],
            known["parameters"]) == ("finished", 3, read_metadata(path.with_name("Llama (2M)"))["parameters"])
    assert (
        checkpoints(path)[-1].name == "step_000003"
        and "ended: finished" in (path / "logs" / "log.txt").read_text()
    )
    ask = load(path).format.format_question("Write a poem about machine learning")
    assert (
        ask
        == "You are a helpful, harmless, and honest AI assistant.\n\n### Instruction:\nWrite a poem about machine learning\n\n### Response:"
    )
    assert run(place, "-m", "mlx_pretrain", "generate", "--run", "Llama-2M-SFT", "--instruction",
               "Write a poem", "--max_new_tokens", "5")
    # overwrite: true
    run(place, "-m", "mlx_pretrain", "sft", "--config", "sft-config.yaml", "--pretrained_model",
        "runs/Llama (2M)")


@pytest.mark.long
def test_guide_with_rewards(place):
    "The second half: rows with rewards, then a reward class, both after the first half's model."
    if not (place / "runs" / "Llama-2M-SFT").exists(): test_guide(place)
    row = json.loads(RL_ROW)
    rows = [row, {**row, "instruction": "Sing", "reward": -1}, {**row, "response": "No.", "reward": 0}]
    (place / "rl_data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    more = "  input_file: rl_data.jsonl\n  validation_file: rl_data.jsonl\n  response_length: 8\ntraining: {hyperparameters: {iters: 2}}\n"
    (place / "rl-config.yaml").write_text(RL_CONFIG + more)
    said = run(place, "rl.py", "--config", "rl-config.yaml", "--pretrained_model", "runs/Llama-2M-SFT")
    last = read_metrics(place / "runs" / "rl-config")[-1]
    assert (
        "off-policy" in said
        and "3 rows, 3 kept" in said
        and "Inherited from the pretrained model: data.system_prompt" in said
    )
    assert {"row_logratio", "val_row_logratio", "val_reward", "val_loss", "reward", "policy_loss",
            "tokens_per_second"} <= last.keys()
    assert "kl" not in last
    code = "from mlx_pretrain.core import RewardModel\n\n" + CUSTOM_REWARD.replace(
        "# Implement your custom reward logic here",
        "rewards = [r.count('o') - len(p) / 100 for p, r in zip(prompts, responses)]",
    )
    (place / "reward_model.py").write_text(code)
    said = run(place, "rl.py", "--config", "rl-config.yaml", "--pretrained_model", "runs/Llama-2M-SFT",
               "--name", "mine", "--reward_model", "reward_model.py:CustomRewardModel")
    last = read_metrics(place / "runs" / "mine")[-1]
    assert "off-policy" not in said and {"kl", "val_kl", "val_reward", "clip_fraction", "entropy",
                                         "eos_fraction"} <= last.keys()
    assert ", reward " in (place / "runs" / "mine" / "logs" / "log.txt").read_text()
    pairs = [{"instruction": "Sing", "chosen": "o" * i, "rejected": "a" * i} for i in range(1, 9)]
    (place / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (place / "taste.yaml").write_text(PAIRS)
    said = run(place, "-m", "mlx_pretrain", "reward", "--config", "taste.yaml", "--pretrained_model",
               "runs/Llama-2M-SFT")
    assert "8 rows, 8 kept; pairs" in said and "accuracy" in said
    shutil.copytree(place / "runs" / "taste", place / "path" / "to" / "reward_model")
    run(place, "rl.py", "--config", "rl-config.yaml", "--pretrained_model", "runs/Llama-2M-SFT",
        "--overwrite", "--reward_model", "path/to/reward_model")
    assert {"kl", "val_kl", "val_reward"} <= read_metrics(place / "runs" / "rl-config")[-1].keys()
    run(place, "-m", "mlx_pretrain", "plot", "mine")
    assert (place / "runs" / "mine" / "curve.png").stat().st_size > 10_000
    assert (
        load(place / "runs" / "mine").format.system_prompt
        == "You are a helpful, harmless, and honest AI assistant."
    )
