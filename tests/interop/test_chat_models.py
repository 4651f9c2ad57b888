"Chat models of each tokenizer family, fine-tuned here: transformers and mlx-lm give the same answers."
import json
import sys
from pathlib import Path

import mlx_pretrain  # noqa: F401, I001 - before MLX, and so before mlx_lm

import mlx.core as mx
import mlx_lm
import pytest
import transformers
from mlx.utils import tree_flatten

sys.path.insert(0, str(Path(__file__).parent))
from published import CHATML, publish  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from mlx_pretrain.chat import render_chat  # noqa: E402
from mlx_pretrain.generate import generate  # noqa: E402
from mlx_pretrain.model import Llama, LlamaArgs  # noqa: E402
from mlx_pretrain.pretrained import args_to_hf, load  # noqa: E402
from mlx_pretrain.sft import SFTConfig, sft  # noqa: E402
from mlx_pretrain.tokenizer import load_tokenizer  # noqa: E402

transformers.logging.set_verbosity_error()
LLAMA3 = ("{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
          "{{ '<|im_start|>' + m.role + '\n\n' + m.content | trim + '<|l|>' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}")
MODELS = { # family, template, LoRA rank, prefix of weight names, other stop tokens
    "SentencePiece": ("spm, legacy False, prefix None", CHATML, 0, "", ()),
    "SentencePiece, legacy": ("spm, legacy True, prefix None", CHATML, 2, "_orig_mod.", ()),
    "Metaspace": ("Metaspace first, split False", CHATML, 0, "module.", ()),
    "Prepend": ("Prepend", CHATML, 0, "", ()),
    "Llama 3's two ends": ("flags", LLAMA3, 0, "", ("<|l|>",)),
    "ByteLevel": ("ByteLevel with bos", CHATML, 2, "", ()),
    "Qwen2": ("Qwen2Tokenizer", CHATML, 0, "", ()),
    "WordPiece": ("WordPiece", CHATML, 0, "", ()),
}


@pytest.fixture(params=MODELS)
def chat_model(request, tmp_path, monkeypatch):
    family, template, rank, prefix, stops = MODELS[request.param]
    folder = publish(family, tmp_path / "hf", template)
    tokenizer = load_tokenizer(folder)
    args = LlamaArgs(vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=64,
                     num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=16)
    weights = {prefix + name: w for name, w in tree_flatten(Llama(args).parameters())}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(args_to_hf(args, tokenizer)))
    if stops: (folder / "generation_config.json").write_text(json.dumps({
        "eos_token_id": [tokenizer.eos_id, *(tokenizer.control[name] for name in stops)]}))
    monkeypatch.chdir(tmp_path)
    return folder, rank


ROWS = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in [("name a bird", "the old gull"), ("who counts", "the boats")]]


def test_fine_tuned_chat_model_agrees_with_transformers_and_mlx_lm(chat_model):
    folder, rank = chat_model
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    values = {"name": "tuned", "pretrained_model": str(folder), "data": {"input_file": "rows.jsonl"},
              "training": {"epochs": 150, "hyperparameters": {"batch_size": 2, "learning_rate": 1e-2},
                           "lora": {"rank": rank}}}
    model, tokenizer, path, fmt = load(sft(SFTConfig.model_validate_json(json.dumps(values))))
    first, lm_tok = AutoTokenizer.from_pretrained(folder), mlx_lm.load(str(path))[1]
    theirs, their_tok = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    for row in ROWS:
        prompt = render_chat(fmt, tokenizer, [], row["messages"][0]["content"])
        for other in (first, their_tok, lm_tok):
            output = other.apply_chat_template(row["messages"][:1], add_generation_prompt=True)
            assert prompt == (output["input_ids"] if hasattr(output, "keys") else output)
        out = generate(model, [prompt], 24, eos_ids=tokenizer.eos_ids, pad_id=tokenizer.pad_id, temperature=0)
        ours = [i for i, counts in zip(out.tokens[0].tolist(), out.response_mask[0].tolist()) if counts]
        input_ids = transformers.BatchEncoding({"input_ids": [prompt]}, tensor_type="pt")["input_ids"]
        output_ids = theirs.generate(input_ids, max_new_tokens=24, do_sample=False)[0, len(prompt):].tolist()
        assert output_ids == ours                                         # including the stop token
        if rank == 0:
            assert ours[-1] in tokenizer.eos_ids
            assert tokenizer.decode(ours).strip() == row["messages"][1]["content"]
