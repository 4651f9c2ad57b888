"Adapters and chats in mlx-lm, transformers and torch: equal files, tokens, gradients and responses."
import fcntl
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx_pretrain  # noqa: F401, I001 - before MLX, and so before mlx_lm

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import mlx_lm.lora
import numpy as np
import pytest
import torch
import transformers
from mlx.utils import tree_flatten, tree_map
from mlx_lm.sample_utils import make_sampler
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mlx_pretrain.chat import render_chat, row_pieces
from mlx_pretrain.generate import generate_text
from mlx_pretrain.lora import LoRAConfig, adapters, apply_lora, load_adapters, save_adapters
from mlx_pretrain.model import Llama, LlamaArgs
from mlx_pretrain.pretrain import PretrainConfig, pretrain
from mlx_pretrain.pretrained import export, load
from mlx_pretrain.prompt import PromptFormat, encode_pieces
from mlx_pretrain.rows import read_examples
from mlx_pretrain.sft import SFTConfig, response_loss, sft
from mlx_pretrain.tokenizer import ByteTokenizer, load_tokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import smollm2  # noqa: E402

transformers.logging.set_verbosity_error()
ARGS = LlamaArgs(vocab_size=259, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
                 num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=256)
IDS = np.array([[257, *b"The gulls count the boats, one by one."],
                [257, *b"A baker carries bread through the fog."]])


def near(ours, theirs):
    ours, theirs = (np.array(x) if isinstance(x, mx.array) else x.detach().numpy() for x in (ours, theirs))
    return np.abs(ours - theirs).max() <= 2e-5 * np.abs(theirs).max()


def lively(**sizes):
    model = Llama(LlamaArgs(**{**ARGS.model_dump(), **sizes}), seed=1)
    return model.update(tree_map(lambda w: 4 * w if w.ndim > 1 else w + 0.1, model.parameters()))


def with_random_adapters(model, **cfg):
    "A model whose adapters have learned something."
    model = apply_lora(model, LoRAConfig(**{"rank": 4, **cfg}))
    return model.update(tree_map(lambda w: w + 0.05 * mx.random.normal(w.shape, key=mx.random.key(w.size)),
                                 model.trainable_parameters()))


def write(rows): Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


# Adapters in both directions


@pytest.mark.parametrize("cfg, sizes", [
    ({}, {}),
    ({"targets": ["q_proj", "k_proj", "mlp.down_proj"], "num_layers": 2, "alpha": 3},
     {"attention_bias": True, "mlp_bias": True}),
    ({"targets": ["q_proj", "k_proj"]}, {"rope_traditional": True, "tie_word_embeddings": False})],
    ids=["all", "some", "neighbours"])
def test_ours_in_mlx_lm_and_merged_in_transformers(tmp_path, cfg, sizes):
    base = lively(**sizes)
    model = with_random_adapters(base, **cfg)
    export(base, ByteTokenizer(), tmp_path / "base")
    export(model, ByteTokenizer(), tmp_path / "merged")
    save_adapters(model, tmp_path / "adapters")
    ours, ids = model(mx.array(IDS)), mx.array(IDS)
    adapted, _ = mlx_lm.load(str(tmp_path / "base"), adapter_path=str(tmp_path / "adapters"))
    assert near(ours, adapted(ids)) and near(mlx_lm.load(str(tmp_path / "merged"))[0](ids), adapted(ids))
    assert near(ours, AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(torch.tensor(IDS)).logits)
    assert not near(ours, mlx_lm.load(str(tmp_path / "base"))[0](ids))


@pytest.mark.parametrize("lora", [{"rank": 4, "scale": 10.0, "dropout": 0.1},
                                  {"rank": 2, "scale": 0.5, "dropout": 0.0,
                                   "keys": ["self_attn.q_proj", "mlp.up_proj"]}])
def test_mlx_lm_adapters_load_here(tmp_path, monkeypatch, lora):
    monkeypatch.chdir(tmp_path)
    export(lively(), ByteTokenizer(), "base")
    Path("data").mkdir()
    for name in ("train", "valid"):
        Path(f"data/{name}.jsonl").write_text((json.dumps({"text": "the gulls count the boats"}) + "\n") * 4)
    settings = {"model": "base", "train": True, "data": "data", "num_layers": 2, "batch_size": 2, "iters": 3,
                "learning_rate": 0.05, "val_batches": 1, "lora_parameters": lora}
    mlx_lm.lora.run(SimpleNamespace(**{**mlx_lm.lora.CONFIG_DEFAULTS, **settings}))
    theirs, _ = mlx_lm.load("base", adapter_path="adapters")
    theirs.eval()
    ours, ids = load_adapters(load("base").model, "adapters"), mx.array(IDS)
    assert near(ours(ids), theirs(ids)) and not near(ours(ids), load("base").model(ids))
    save_adapters(ours, "again")                                          # and back
    assert near(ours(ids), mlx_lm.load("base", adapter_path="again")[0](ids))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    "An untrained base model, and a LoRA run that has learned four responses."
    home = tmp_path_factory.mktemp("tuned")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        Path("text.jsonl").write_text(json.dumps({"text": "the gulls count the boats " * 20}) + "\n")
        pretrain(PretrainConfig.model_validate_json(json.dumps({
            "name": "base", "data": {"input_file": "text.jsonl", "preprocessing": {"max_context_size": 64}},
            "model": {"dimensions": {"hidden_size": 32, "num_layers": 2}},
            "training": {"hyperparameters": {"batch_size": 2, "iters": 1}}})))
        write([{"prompt": f"Say {i}:", "completion": word}
               for i, word in enumerate(["one", "two and a half", "three gulls", "4"])])
        sft(
            SFTConfig.model_validate_json(
                json.dumps(
                    {
                        "name": "lora",
                        "pretrained_model": "base",
                        "data": {"input_file": "rows.jsonl", "preprocessing": {"max_context_size": 64}},
                        "training": {
                            "epochs": 120,
                            "lora": {"rank": 16, "alpha": 64},
                            "hyperparameters": {"batch_size": 4, "learning_rate": 1e-2},
                        },
                    }
                )
            )
        )
    return home / "runs"


def test_mlx_lm_command_line_generates_the_same(tuned):
    model, tok, *_ = load(tuned / "lora")
    [ours] = generate_text(model, tok, ["Say 2:"], 30, temperature=0)
    adapted = load_adapters(load(tuned / "base").model, tuned / "lora" / "adapters")
    assert ours == "three gulls" == generate_text(adapted, tok, ["Say 2:"], 30, temperature=0)[0]
    command = [sys.executable, "-m", "mlx_lm", "generate", "--model", tuned / "base" / "model",
               "--adapter-path", tuned / "lora" / "adapters", "--prompt", "Say 2:", "--ignore-chat-template",
               "--temp", "0", "--max-tokens", "30"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split("==========")[1].strip() == ours


# Gradients


class TorchLoRA(torch.nn.Module):
    "LoRA as the paper has it, around one of torch's linear layers."
    def __init__(self, linear, a, b, scale):
        super().__init__()
        self.linear, self.scale = linear, scale
        self.a, self.b = (torch.nn.Parameter(torch.tensor(np.array(w))) for w in (a, b))

    def forward(self, x): return self.linear(x) + self.scale * (x @ self.a) @ self.b


@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradients_of_adapters(tmp_path, monkeypatch, tied):
    monkeypatch.chdir(tmp_path)
    base, tok = lively(tie_word_embeddings=tied), ByteTokenizer()
    model = with_random_adapters(base, alpha=12)
    weights = adapters(model)
    export(base, tok, "base")
    theirs = AutoModelForCausalLM.from_pretrained("base").requires_grad_(False)
    for name in {name.rpartition(".")[0] for name in weights}:
        inside, _, last = name.rpartition(".")
        inside = theirs.get_submodule(inside)
        setattr(inside, last, TorchLoRA(getattr(inside, last), weights[f"{name}.lora_a"],
                                     weights[f"{name}.lora_b"], 3.0))

    texts = ["Who?", "Gulls.", "And?", "Boats, many.", "So?", "Sand."]
    talk = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 3, texts)]
    write([{"messages": talk}, {"messages": talk[2:]}, {"messages": talk[:2]}])
    examples = read_examples("rows.jsonl", tok, PromptFormat(input_field="messages", output_field="messages"),
                             256)
    width = examples.lengths.max()
    ids, labels = np.full((3, width), tok.pad_id), np.full((3, width), -100)
    for r, row in enumerate(examples[i] for i in range(3)):
        ids[r, :len(row.ids)] = row.ids
        labels[r, :len(row.ids)] = np.where(row.loss_mask, row.ids, -100)
    want = theirs(torch.tensor(ids), attention_mask=torch.tensor(ids != tok.pad_id).long(),
                  labels=torch.tensor(labels)).loss
    want.backward()
    total, grads = nn.value_and_grad(model, lambda batch: response_loss(model, batch)[0])(
        examples.batch(np.arange(3))
    )
    assert (count := examples.n_targets) == (labels != -100).sum() and abs(
        total.item() / count - want.item()
    ) < 1e-5 * want.item()
    by_name = {f"{name[:-1]}lora_{name[-1]}": p.grad.numpy()
               for name, p in theirs.named_parameters() if p.requires_grad}
    assert by_name.keys() == (ours := dict(tree_flatten(grads))).keys() == weights.keys()
    for name, g in ours.items():
        assert np.abs(np.array(g) / count - by_name[name]).max() <= 1e-4 * np.abs(by_name[name]).max(), name


# Conversations in transformers' tokens. In their templates, `generation` marks what is trained.


def say(what):
    what = "{{ " + what + " }}"
    return (
        "{% if message['role'] == 'assistant' %}{% generation %}"
        + what
        + "{% endgeneration %}{% else %}"
        + what
        + "{% endif %}"
    )


CHATML = ("{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
          "{{ '<|im_start|>system\nYou are a gull<|im_end|>\n' }}{% endif %}"
          "{{ '<|im_start|>' + message['role'] + '\n' }}"
          + say("message['content'] + '<|im_end|>'") +
          "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
LLAMA3 = ("{% for message in messages %}{% if loop.index0 == 0 %}{{ bos_token }}{% endif %}"
          "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
          + say("message['content'] | trim + '<|eot_id|>'") +
          "{% endfor %}{% if add_generation_prompt %}"
          "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")
ZEPHYR = ("{% for message in messages %}\n{{ '<|' + message['role'] + '|>\n' }}"
          + say("message['content'] + eos_token") +
          "{{ '\n' }}{% if loop.last and add_generation_prompt %}"
          "\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}")
IM, HEADER, S = ["<|im_start|>", "<|im_end|>"], ["<|start_header_id|>", "<|end_header_id|>"], ["<s>", "</s>"]
EOT, BARS = ["<|begin_of_text|>", "<|eot_id|>"], ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"]
KINDS = {  # template, tokenizer, beginning and end, other special tokens
    "chatml": (CHATML, "bytes", IM, []),
    "llama 3": (LLAMA3, "bytes", EOT, HEADER),
    "zephyr": (ZEPHYR, "bytes", S, []),
    "no tools": ("{% if tools is not none %}TOOLS{% endif %}" + CHATML, "bytes", IM, []),
    "names with a bar": (LLAMA3.replace(EOT[1], BARS[1]), "bytes", BARS, HEADER),
    "zephyr, blank in front": (ZEPHYR, "blank in front", S, []),
    "chatml, blank in front": (CHATML, "blank in front", IM, []),
}
TALKS = [[{"role": role, "content": text} for role, text in zip(roles, texts)]
         for roles, texts in ((["user", "assistant"], ["Who is there?", "The gulls.\n\nAnd the boats."]),
                              (["system", "user", "assistant", "user", "assistant"],
                               ["Be brief.", "  Who, 123?", "Gulls <3", "And? ", "The old man 🙂."]),
                              (["user", "assistant"] * 3, ["a", "b", "The man\ncounts", "the boats", "é",
                                                           "."]))]


def make_tokenizer(folder, template, kind, ends, others):
    "A small tokenizer: byte-level as Llama 3's, or with a space in front of a text as Llama 2's."
    made = Tokenizer(models.BPE(byte_fallback=kind != "bytes",
                                unk_token=None if kind == "bytes" else "<unk>"))
    more = {}
    if kind == "bytes":
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        more["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
    else:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                          decoders.Fuse(), decoders.Strip(" ", 1, 0)])
        more["special_tokens"] = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    made.train_from_iterator(
        ["The old man counts the boats. Who is there? The gulls. user assistant system"] * 30,
        trainers.BpeTrainer(vocab_size=360, show_progress=False, **more),
    )
    plain = json.loads(made.to_str())
    plain["added_tokens"] = [token
                             for token in plain["added_tokens"] if not token["content"].startswith("<0x")]
    made = Tokenizer.from_str(json.dumps(plain))
    made.add_special_tokens([AddedToken(name, normalized=False) for name in (*ends, *others)])
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": ends[0], "eos_token": ends[1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    (folder / "chat_template.jinja").write_text(template)
    return folder


BY_TEMPLATE = PromptFormat(prompt_format=None)
def made(tok, talk): return encode_pieces(tok, [row_pieces(BY_TEMPLATE, tok, {"instruction": talk})])[0]


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_mask_of_a_conversation(tmp_path, kind):
    template, *rest = KINDS[kind]
    plain = template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    ours = load_tokenizer(make_tokenizer(tmp_path / "plain", plain, *rest))
    theirs = AutoTokenizer.from_pretrained(make_tokenizer(tmp_path / "marked", template, *rest))
    for talk in TALKS:
        want = theirs.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True)
        row = made(ours, talk)
        assert theirs.convert_ids_to_tokens(row.ids) == theirs.convert_ids_to_tokens(want["input_ids"])
        assert row.loss_mask == [bool(trained) for trained in want["assistant_masks"]]
        asked = theirs.apply_chat_template([talk[-2]], add_generation_prompt=True,
                                           return_dict=True)["input_ids"]
        assert render_chat(BY_TEMPLATE, ours, [], talk[-2]["content"]) == asked


def test_template_with_generation_blocks(tmp_path):
    folder = make_tokenizer(tmp_path / "marked", *KINDS["chatml"])
    want = AutoTokenizer.from_pretrained(folder).apply_chat_template(TALKS[0], return_dict=True)["input_ids"]
    assert made(load_tokenizer(folder), TALKS[0]).ids == want


# Models that others have saved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tied", [True, False])
def test_sharded_weights(tmp_path, dtype, tied):
    torch.manual_seed(0)
    sizes = ARGS.model_dump(include={"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                     "num_attention_heads", "num_key_value_heads", "head_dim",
                                     "max_position_embeddings"})
    saved = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=tied, initializer_range=0.2)).to(dtype)
    saved.save_pretrained(tmp_path, max_shard_size="100KB")
    ByteTokenizer().save(tmp_path)
    assert len([*tmp_path.glob("*.safetensors")]) > 2 and (tmp_path / "model.safetensors.index.json").exists()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert near(load(tmp_path).model(mx.array(IDS)), theirs(torch.tensor(IDS)).logits)


@pytest.fixture(scope="session")
def smol():
    "A real model: SmolLM2-135M-Instruct."
    path = Path(smollm2.__file__).parents[1] / "data" / "SmolLM2-135M-Instruct"
    path.parent.mkdir(exist_ok=True)
    with (path.parent / ".lock").open("w") as lock: # of two parallel workers, one downloads it
        fcntl.flock(lock, fcntl.LOCK_EX)
        smollm2.main()
    return path


def test_published_model_generates_the_same_everywhere(smol):
    model, tok, *_ = load(smol)
    theirs = AutoModelForCausalLM.from_pretrained(smol, dtype=torch.float32)
    their_tok = AutoTokenizer.from_pretrained(smol)
    lm, lm_tok = mlx_lm.load(str(smol))
    question = [{"role": "user", "content": "What is the capital of France?"}]
    asked = render_chat(BY_TEMPLATE, tok, [], question[0]["content"])
    assert asked == their_tok.apply_chat_template(question, add_generation_prompt=True,
                                                  return_dict=True)["input_ids"]
    for ids in (tok.encode("The capital of France is"), asked):
        ours, want = model(mx.array([ids])), theirs(torch.tensor([ids])).logits
        assert near(ours, want) and near(lm(mx.array([ids])), want)
        [text] = generate_text(model, tok, [ids], 12, temperature=0)
        assert "Paris" in text  # mlx-lm's text begins without the blank
        assert text.lstrip() == mlx_lm.generate(lm, lm_tok, ids, max_tokens=12,
                                                sampler=make_sampler(0)).lstrip()
        out = theirs.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)).long(),
                              max_new_tokens=12, do_sample=False)
        assert text == their_tok.decode(out[0, len(ids):], skip_special_tokens=True)


def test_adapters_of_a_published_model(smol, tmp_path):
    model, tok, *_ = load(smol)
    model = with_random_adapters(model, targets=["q_proj", "v_proj", "down_proj"], num_layers=4, alpha=2)
    save_adapters(model, tmp_path)
    ids = mx.array([tok.encode("The capital of France is")])
    lm, _ = mlx_lm.load(str(smol), adapter_path=str(tmp_path))
    assert near(model(ids), lm(ids)) and not near(model(ids), load(smol).model(ids))
