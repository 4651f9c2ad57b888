"Fine-tuning compared with transformers: same loss and gradients with labels of -100, same prompts."
import json
from pathlib import Path

import mlx_pretrain  # noqa: F401, I001 - before MLX, and so before mlx_lm

import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
import torch
import transformers
from mlx.utils import tree_flatten, tree_map
from transformers import AutoModelForCausalLM, AutoTokenizer

from mlx_pretrain.generate import generate_text
from mlx_pretrain.model import Llama, LlamaArgs
from mlx_pretrain.pretrained import export, load
from mlx_pretrain.chat import render_chat
from mlx_pretrain.prompt import PromptFormat, prompt_ids
from mlx_pretrain.rows import read_examples
from mlx_pretrain.sft import SFTConfig, response_loss, sft
from mlx_pretrain.tokenizer import ByteTokenizer, train_sentencepiece

transformers.logging.set_verbosity_error()
SIZES = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, head_dim=16)
ROWS = [{"instruction": f"How many gulls are {n} gulls?", "response": f"{'gull ' * n}and </s> no more."}
        for n in (1, 7, 3, 12)]
FORMATS = {"plain": PromptFormat(), "system": PromptFormat(prompt_format="Q: {instruction}\nA:",
                                                           response_format=" {response}\n",
                                                           system_prompt='Say "🙂 {{x}}" \\n.'),
           "inside": PromptFormat(prompt_format="[{system_prompt}] {instruction}\n",
                                  system_prompt="Be brief."), }


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    lines = [f"{row['instruction']}\n{row['response']} ### Instruction: Response" for row in ROWS] * 20
    return {"byte": ByteTokenizer(),
            "sentencepiece": train_sentencepiece(lines, 300, tmp_path_factory.mktemp("sp"))}


@pytest.fixture(params=["byte", "sentencepiece"])
def tokenizer(request, tokenizers): return tokenizers[request.param]


def with_labels(examples, n, pad):
    "Rows for transformers: ids padded on the right, and labels of -100 for tokens that are not trained."
    rows = [examples[i] for i in range(n)]
    width = max(len(row.ids) for row in rows)
    ids, labels = np.full((n, width), pad), np.full((n, width), -100)
    attention = np.zeros((n, width), int)
    for r, (row, trained) in enumerate(rows):
        ids[r, :len(row)] = row
        labels[r, :len(row)] = np.where(trained, row, -100)
        attention[r, :len(row)] = 1
    return tuple(map(torch.tensor, (ids, labels, attention)))


@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradients_of_a_step(tokenizer, tmp_path, tied):
    args = LlamaArgs(vocab_size=tokenizer.vocab_size, tie_word_embeddings=tied, **SIZES)
    model = Llama(args, seed=1)
    model.update(tree_map(lambda w: 4 * w if w.ndim > 1 else w + 0.1, model.parameters()))
    export(model, tokenizer, tmp_path / "m")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    examples = read_examples(tmp_path / "rows.jsonl", tokenizer, PromptFormat(), 256)
    ids, labels, attention = with_labels(examples, 4, tokenizer.pad_id)

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    expected = theirs(ids, attention_mask=attention, labels=labels).loss
    expected.backward()
    batch = examples.batch(np.arange(4))
    total, grads = nn.value_and_grad(model, lambda batch: response_loss(model, batch)[0])(batch)
    count = batch.loss_mask.sum().item()
    assert count == (labels != -100).sum().item() == sum(len(tokenizer.encode(row["response"])) + 1
                                                         for row in ROWS)
    assert abs(total.item() / count - expected.item()) < 1e-5 * expected.item()
    theirs_by_name = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    ours = dict(tree_flatten(grads))
    assert ours.keys() == theirs_by_name.keys()
    for name, g in ours.items():
        error = np.abs(np.array(g) / count - theirs_by_name[name]).max()
        assert error <= 1e-4 * np.abs(theirs_by_name[name]).max(), name

    theirs.zero_grad()  # the planted bug: the prompt is trained too
    theirs(ids, attention_mask=attention, labels=torch.where(attention.bool(), ids, -100)).loss.backward()
    name, g = "model.norm.weight", dict(theirs.named_parameters())["model.norm.weight"].grad.numpy()
    assert np.abs(np.array(ours[name]) / count - g).max() > 0.1 * np.abs(g).max()


@pytest.mark.parametrize("name", FORMATS)
def test_exported_chat_template_gives_the_same_prompt_tokens(tokenizer, tmp_path, name):
    fmt, args = FORMATS[name], LlamaArgs(vocab_size=tokenizer.vocab_size, **SIZES)
    export(Llama(args), tokenizer, tmp_path / "m", fmt)
    for theirs in (AutoTokenizer.from_pretrained(tmp_path / "m"), mlx_lm.load(str(tmp_path / "m"))[1]):
        def ids(*turns, theirs=theirs):
            messages = [{"role": role, "content": text}
                        for role, text in zip(["user", "assistant"] * 9, turns)]
            text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            return theirs.encode(text, add_special_tokens=False)
        assert ids("How many?") == prompt_ids(tokenizer, fmt.format_question("How many?"))
        chat, response = ids("How many?", "Three.", "And now?"), fmt.response({"response": "Three."})
        ours = render_chat(fmt, tokenizer, [("How many?", response)], "And now?")
        assert tokenizer.decode(chat) == tokenizer.decode(ours)
        assert chat.count(tokenizer.bos_id) == chat.count(tokenizer.eos_id) == 1
    assert load(tmp_path / "m").format == fmt


def test_a_fine_tuned_model_gives_the_same_answers_in_transformers_and_mlx_lm(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["one", "two and a half", "three gulls", "4"]
    Path("rows.jsonl").write_text("".join(json.dumps({"instruction": f"Say {i}", "response": w}) + "\n"
                                          for i, w in enumerate(words)))
    values = {"name": "tuned",
              "data": {"input_file": "rows.jsonl", "preprocessing": {"max_context_size": 128}},
              "model": {"dimensions": {"hidden_size": 32, "num_layers": 2}},
              "training": {"epochs": 100, "hyperparameters": {"batch_size": 4, "learning_rate": 1e-2}}}
    model, tok, path, fmt = load(sft(SFTConfig.model_validate_json(json.dumps(values))))
    [ours] = generate_text(model, tok, [fmt.format_question("Say 2")], 40, temperature=0)
    assert ours == "three gulls"

    theirs, their_tok = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    messages = [{"role": "user", "content": "Say 2"}]
    inputs = their_tok.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt",
                                          return_dict=True)
    out = theirs.generate(**inputs, max_new_tokens=40, do_sample=False)[0, inputs["input_ids"].shape[1]:]
    assert their_tok.decode(out, skip_special_tokens=True) == ours and out[-1].item() == tok.eos_id
    lm, lm_tok = mlx_lm.load(str(path))
    assert mlx_lm.generate(lm, lm_tok, lm_tok.apply_chat_template(messages, add_generation_prompt=True),
                           max_tokens=40) == ours
