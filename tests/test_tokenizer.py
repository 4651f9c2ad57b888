"""Properties of mlx_pretrain.tokenizer: lossless round trips, no special tokens from text, clear errors."""
import json
import os
from pathlib import Path

import numpy as np
import pytest
from common import ENGLISH, KINDS, TEXT, check_sentence, forall, saved, tokenizer, write_documents
from hypothesis import strategies as st

from mlx_pretrain import tokenizer as module
from mlx_pretrain.config import ConfigError, DataError, load_config
from mlx_pretrain.data import cached_windows, pack, read_texts
from mlx_pretrain.tokenizer import (
    ByteTokenizer, HFTokenizer, SentencePieceTokenizer, SpecialTokens, TokenizerConfig,
    load_tokenizer, train_sentencepiece)


@KINDS
@forall(text=TEXT)
def test_decode_inverts_encode_for_any_text(kind, text):
    tok = tokenizer(kind)
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    assert tok.decode([tok.bos_id, *ids, tok.eos_id, tok.pad_id]) == text
    assert all(0 <= i < tok.vocab_size for i in ids)
    assert not {tok.pad_id, tok.bos_id, tok.eos_id} & set(ids)  # the name of a special token stays text


@KINDS
@forall(texts=st.lists(TEXT, max_size=5))
def test_encode_batch_equals_encode(kind, texts):
    assert tokenizer(kind).encode_batch(texts) == [tokenizer(kind).encode(t) for t in texts]


@forall(text=TEXT.filter(lambda t: "▁" not in t))
def test_cutting_at_line_breaks_keeps_ids(text):
    tok = tokenizer("sentencepiece")
    assert tok.encode(text) == tok._sp.encode(text)


@KINDS
@forall(ids=st.lists(st.integers(0, 258), max_size=20))
def test_any_ids_decode_to_utf8(kind, ids): tokenizer(kind).decode(ids).encode()


@forall(ids=st.lists(st.integers(0, 258), max_size=20))
def test_byte_and_hf_tokenizer_agree_on_invalid_utf8(ids):
    assert tokenizer("huggingface").decode(ids) == tokenizer("bytes").decode(ids)


def test_round_trips_fail_without_our_additions():
    sp, hf = tokenizer("sentencepiece"), HFTokenizer(saved(ByteTokenizer()))
    assert sp._sp.decode(sp._sp.encode("a▁b")) == "a b"  # what SentencePiece alone would lose
    # the ids without our escaping
    assert hf._tok.encode("<eos>", add_special_tokens=False).ids == [hf.eos_id]
    assert hf.encode("<eos>") == list(b"<eos>")


@KINDS
@pytest.mark.parametrize("text", ["lone \ud800", "\udfff"])
def test_lone_surrogates_are_refused(kind, text):
    with pytest.raises(DataError, match="lone surrogate"): tokenizer(kind).encode(text)


@KINDS
@forall(20, text=TEXT)
def test_saved_tokenizers_load_with_the_same_ids(kind, text):
    tok = tokenizer(kind)
    back = load_tokenizer(saved(tok))
    assert back.encode(text) == tok.encode(text)
    assert (back.pad_id, back.bos_id, back.eos_id,
            back.vocab_size) == (tok.pad_id, tok.bos_id, tok.eos_id, tok.vocab_size)


@pytest.mark.parametrize("size", [256, 300, 1000])
def test_byte_tokenizer_keeps_its_ids_as_tokenizer_json(size):
    tok = ByteTokenizer(size, SpecialTokens(pad="[PAD]", bos="[B]", eos="[E]"))
    home = saved(tok)
    for back in (load_tokenizer(home), HFTokenizer(home)):
        assert (back.pad_id, back.bos_id, back.eos_id,
                back.vocab_size) == (size, size + 1, size + 2, size + 3)
        assert back.encode("[E] é\n") == list("[E] é\n".encode())
        assert [back.piece(i) for i in (size, size + 1, size + 2)] == ["[PAD]", "[B]", "[E]"]
        assert back.piece(0xE2) == "<0xE2>" and back.piece(97) == "a"
    config = json.loads(open(f"{home}/tokenizer_config.json").read())
    assert config["add_bos_token"] is True and [config[f"{name}_token"]
                                                for name in ("pad", "bos", "eos")] == ["[PAD]", "[B]", "[E]"]


def test_training_is_deterministic_and_quiet(tmp_path, capfd):
    first, second = tmp_path / "1", tmp_path / "2"
    train_sentencepiece(ENGLISH, 290, first)
    train_sentencepiece(iter(ENGLISH), 290, second)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert capfd.readouterr() == ("", "")


def test_training_errors_name_the_remedy(tmp_path):
    with pytest.raises(
        DataError, match=r"too small for a vocabulary of 5000: set data.tokenizer.vocab_size to (\d+) or less"
    ) as error:
        train_sentencepiece(ENGLISH, 5000, tmp_path)
    limit = int(error.value.args[0].split("vocab_size to ")[1].split()[0])
    assert train_sentencepiece(ENGLISH, limit, tmp_path).vocab_size == limit   # the remedy works
    with pytest.raises(DataError, match="vocab_size to more than"):
        train_sentencepiece([str(bytes(range(128)))], 264, tmp_path)
    for texts in ([], [""], ["\n\n"]):
        with pytest.raises(DataError, match="no text"): train_sentencepiece(texts, 300, tmp_path)


def test_row_errors_pass_through_training(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "fine"}\n{"text": 7}\n')
    with pytest.raises(DataError, match='rows.jsonl, line 2: "text" must be a string'):
        train_sentencepiece(read_texts(tmp_path / "rows.jsonl"), 300, tmp_path)
    def stopped():
        yield "fine"
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): train_sentencepiece(stopped(), 300, tmp_path)


def test_directory_holds_the_last_saved_tokenizer(tmp_path):
    ByteTokenizer().save(tmp_path)
    train_sentencepiece(ENGLISH, 290, tmp_path)
    assert isinstance(load_tokenizer(tmp_path), SentencePieceTokenizer)
    ByteTokenizer(300).save(tmp_path)
    assert load_tokenizer(tmp_path).vocab_size == 303 and not (tmp_path / "tokenizer.model").exists()


def test_tokenizer_does_not_need_its_directory_after_loading(tmp_path):
    tok = train_sentencepiece(ENGLISH, 290, tmp_path / "old")
    for file in (tmp_path / "old").iterdir(): file.unlink()
    tok.save(tmp_path / "new")
    assert load_tokenizer(tmp_path / "new").encode(ENGLISH[0]) == tok.encode(ENGLISH[0])


def test_precedence_of_special_tokens_in_published_models(tmp_path):
    "First the tokenizer's own, then config.json, then generation_config.json; without pad, eos pads."
    ByteTokenizer().save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    def ids(): return (tok := HFTokenizer(tmp_path)).bos_id, tok.eos_id, tok.pad_id
    def write(name, **values): (tmp_path / name).write_text(json.dumps(values))
    with pytest.raises(DataError, match='add "eos_token" to its tokenizer_config.json'): ids()
    write("generation_config.json", eos_token_id=[97, 98], bos_token_id=None)
    assert ids() == (None, 97, 97)
    # ids outside the vocabulary are ignored
    write("config.json", eos_token_id=99, pad_token_id=5000, bos_token=7)
    assert ids() == (None, 99, 99)
    write("tokenizer_config.json", bos_token="<bos>", eos_token="<pad>", pad_token=None, chat_template="kept")
    assert ids() == (257, 256, 256)
    # it takes precedence, as in transformers
    write("special_tokens_map.json", eos_token={"content": "<eos>"}, pad_token="<pad>")
    assert ids() == (257, 258, 256)
    assert HFTokenizer(tmp_path).eos_ids == (258, 99, 97, 98)                              # all stop tokens
    HFTokenizer(tmp_path).save(tmp_path / "copy")
    assert json.loads((tmp_path / "copy" / "tokenizer_config.json").read_text()) == {
        "bos_token": "<bos>", "eos_token": "<pad>", "pad_token": None, "chat_template": "kept",
        "mlx_pretrain_ids": {"bos_token_id": 257, "eos_token_id": [258, 99, 97, 98], "pad_token_id": 256}}
    assert (HFTokenizer(tmp_path / "copy").eos_ids, HFTokenizer(tmp_path / "copy").fingerprint) == (
        (258, 99, 97, 98), HFTokenizer(tmp_path).fingerprint)


def test_pieces_of_a_converted_sentencepiece_model(tmp_path):
    decoder = {"type": "Sequence",
               "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                            {"type": "ByteFallback"}]}
    model = {"type": "BPE", "vocab": {"</s>": 0, "<0xC3>": 1, "▁sea": 2}, "merges": [], "byte_fallback": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [],
                                                         "decoder": decoder, "model": model}))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    assert [HFTokenizer(tmp_path).piece(i) for i in range(3)] == ["</s>", "<0xC3>", " sea"]


def test_tokenizers_that_cannot_be_loaded_are_refused(tmp_path):
    remedy = "make one with `mlx-pretrain tokenizer --config FILE`"
    with pytest.raises(DataError, match=f"holds no tokenizer.json and no tokenizer.model; {remedy}"):
        load_tokenizer(tmp_path)
    with pytest.raises(DataError, match=f"is not a tokenizer directory; {remedy}"):
        load_tokenizer(tmp_path / "missing")
    (tmp_path / "tokenizer.model").write_bytes(b"\x00\x01")
    with pytest.raises(DataError, match="is not a tokenizer directory"):
        load_tokenizer(tmp_path / "tokenizer.model")
    with pytest.raises(DataError, match="is not a SentencePiece model"): load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[1")
    with pytest.raises(DataError, match="tokenizer.json cannot be read"): load_tokenizer(tmp_path)
    ByteTokenizer().save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"normal_vocab_size": "many"}')
    with pytest.raises(DataError, match="tokenizer_config.json is damaged"): load_tokenizer(tmp_path)
    with pytest.raises(DataError, match="cannot write the tokenizer"):
        ByteTokenizer().save(tmp_path / "tokenizer.json" / "inside")


TOKENIZERS = {  # change to a directory with a valid tokenizer, part of the message
    "damaged JSON": (lambda d: os.truncate(d / "tokenizer.json", 100), "tokenizer.json is not valid JSON"),
    "no eos": (
        lambda d: (d / "tokenizer_config.json").write_text("{}"),
        'does not say which token ends a document; add "eos_token"',
    ),
    "unknown eos": (
        lambda d: (d / "tokenizer_config.json").write_text('{"eos_token": "</s>"}'),
        "document (eos_token '</s>' is not one of its tokens)",
    ),
    "eos outside": (
        lambda d: (
            (d / "tokenizer_config.json").write_text("{}")
            and (d / "config.json").write_text('{"eos_token_id": 5000}')
        ),
        "(eos_token_id 5000 is not one of its tokens)",
    ),
    "eos of nonsense": (
        lambda d: (d / "tokenizer_config.json").write_text(
            '{"eos_token": ["a"], "eos_token_id": {"b": true}}'
        ),
        "which token ends a document",
    ),
    "other config": (
        lambda d: (d / "tokenizer_config.json").write_bytes(
            ByteTokenizer(300)._files["tokenizer_config.json"]
        ),
        "tokenizer.json and tokenizer_config.json do not belong together",
    ),
    "equal names": (
        lambda d: (d / "tokenizer_config.json").write_text(
            '{"normal_vocab_size": 256, "pad_token": "<a>", "bos_token": "<a>", "eos_token": "<b>"}'
        ),
        "tokenizer_config.json is damaged",
    ),
    "too few bytes": (
        lambda d: (d / "tokenizer_config.json").write_text('{"normal_vocab_size": 3}'),
        "tokenizer_config.json is damaged",
    ),
    "config is a list": (
        lambda d: (d / "tokenizer_config.json").write_text("[]"),
        "does not hold a JSON object",
    ),
    "deep config": (lambda d: (d / "tokenizer_config.json").write_text("[" * 100_000), "is not valid JSON"),
    "binary config": (lambda d: (d / "tokenizer_config.json").write_bytes(b"\xff"), "is not valid JSON"),
    "model is a list": (
        lambda d: (d / "tokenizer.json").write_text('{"model": []}'),
        "do not belong together",
    ),
    "not a model": (
        lambda d: (d / "tokenizer.json").rename(d / "tokenizer.model"),
        "is not a SentencePiece model",
    ),
    "empty": (lambda d: [f.unlink() for f in d.iterdir()], "holds no tokenizer.json and no tokenizer.model"),
}


@pytest.mark.parametrize(("change", "part"), TOKENIZERS.values(), ids=TOKENIZERS)
def test_invalid_tokenizer_directory_gives_one_sentence(tmp_path, change, part):
    ByteTokenizer().save(tmp_path / "tok")
    change(tmp_path / "tok")
    with pytest.raises(DataError) as error: load_tokenizer(tmp_path / "tok")
    check_sentence(str(error.value), str(tmp_path / "tok"), part)


@forall(150, cut=st.integers(0, 5000), junk=st.binary(max_size=4), byte=st.booleans(),
        name=st.sampled_from(["tokenizer.json", "tokenizer_config.json"]))
def test_damaged_tokenizer_files_load_or_give_one_sentence(cut, junk, name, byte):
    home = Path(saved(ByteTokenizer()))
    if not byte: (home / "tokenizer_config.json").write_text('{"eos_token": "<eos>", "pad_token": "<pad>"}')
    content = (home / name).read_bytes()
    (home / name).write_bytes(content[:cut] + junk + content[cut + len(junk):])
    try: tok = load_tokenizer(home)
    except DataError as e: return check_sentence(str(e).replace(". ", ""), str(home))
    try: pack(["any text, é"], tok, 8)
    except DataError as e: check_sentence(str(e).replace(". ", ""))


def word_level(home, **model):
    "A tokenizer.json with one word, and no token for other words."
    home.mkdir(exist_ok=True)
    model = {"type": "WordLevel", "vocab": {"word": 0, "</s>": 1}, "unk_token": "<unk>", **model}
    content = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "model": model}
    (home / "tokenizer.json").write_text(json.dumps(content))
    (home / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return load_tokenizer(home)


def test_errors_of_the_tokenizers_library_become_data_errors(tmp_path):
    tok = word_level(tmp_path / "tok")
    assert tok.encode("word word") == [0, 0]
    with pytest.raises(DataError) as error: tok.encode("another")
    check_sentence(str(error.value), f"{tmp_path}/tok/tokenizer.json cannot encode a text (", "copy it again")
    with pytest.raises(Exception) as original: tok._tok.encode("another") # the library's own error
    assert not isinstance(original.value, DataError)
    file = write_documents(tmp_path / "rows.jsonl", ["word", "word", "another", "word"])
    with pytest.raises(DataError) as error: cached_windows(file, tok, 8)
    check_sentence(str(error.value), f"{file}, line 3: {tmp_path}/tok/tokenizer.json cannot encode a text (")
    with pytest.raises(OverflowError): tok._tok.decode([2**40])
    with pytest.raises(DataError): tok._decode([2**40])


@KINDS
def test_ids_outside_the_vocabulary(kind):
    tok = tokenizer(kind)
    ids = tok.encode("ab")
    # models may have more ids
    assert tok.decode([*ids, tok.vocab_size, 2**40]) == "ab"
    assert tok.piece(tok.vocab_size) == f"<{tok.vocab_size}>"
    with pytest.raises(DataError, match="there is no token -1; ids count from 0"): tok.decode([97, -1])
    assert tok.piece(-1) == "<-1>"


@KINDS
def test_fingerprint_depends_on_files_except_the_chat_template(kind, tmp_path):
    tok = tokenizer(kind)
    tok.save(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == tok.fingerprint and len(tok.fingerprint) == 64
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")       # does not affect token ids
    if kind != "bytes": assert type(tok)(tmp_path).fingerprint == tok.fingerprint
    (tmp_path / "special_tokens_map.json").write_text('{"x": "y"}')
    if kind != "bytes": assert type(tok)(tmp_path).fingerprint != tok.fingerprint
    prints = [ByteTokenizer(), ByteTokenizer(300), ByteTokenizer(special_tokens=SpecialTokens(eos="<end>")),
              tokenizer("sentencepiece")]
    assert len({t.fingerprint for t in prints}) == 4


@forall(text=TEXT.filter(lambda t: "▁" not in t), size=st.integers(1, 4))
def test_cutting_long_lines_keeps_ids(text, size):
    tok = tokenizer("sentencepiece")
    parts = module._cut(text, tok._joined, size)
    assert "".join(parts) == text
    assert [i for n, part in enumerate(parts)
            for i in (tok._cuts[part] if n % 2 else tok._sp.encode(part))] == tok._sp.encode(text)


def test_cutting_inside_tokens_changes_ids():
    tok = tokenizer("sentencepiece")
    parts = module._cut(ENGLISH[0], set(), 2)  # planted bug: tokens are cut
    cut_ids = [i for part in parts[::2] for i in tok._sp.encode(part)]
    assert cut_ids != [i for line in ENGLISH[0].split("\n") for i in tok._sp.encode(line)]


def test_long_lines_and_documents_decode_unchanged(tmp_path):
    tok = tokenizer("sentencepiece")
    for text in (
        "the old man counts " * 40_000,
        "x" * 30_000,
        "é\n" * 50_000,
        "漢字" * 20_000,
        "▁" * 15_000 + " " * 15_000,
    ):
        assert tok.decode(tok.encode(text)) == text
        if "▁" not in text: assert tok.encode(text) == tok._sp.encode(text)


def test_long_training_text_is_sampled_uniformly_with_a_warning(tmp_path, monkeypatch, caplog):
    lines = [f"instruction number {n}" if n % 2 else f"response number {n}" for n in range(20_000)]
    with caplog.at_level("WARNING", logger="mlx_pretrain"):  # about a tenth
        sample = module._sample_lines(lines, 340_000)
    assert "uniform sample of" in caplog.text and "% of its lines" in caplog.text
    numbers = [int(line.split()[-1]) for line in sample]
    assert numbers == sorted(set(numbers)) and 1500 < len(numbers) <= 2000
    assert 0.44 < np.mean([n % 2 for n in numbers]) < 0.56  # both kinds
    assert all(0.7 < c / (len(numbers) / 4) < 1.3 for c in np.histogram(numbers, 4, (0, 20_000))[0])
    assert module._sample_lines(lines, 340_000) == sample
    caplog.clear()
    assert module._sample_lines(lines, 10**8) == lines and not caplog.text
    monkeypatch.setattr(module, "_MAX_TRAINING", 5000)
    assert train_sentencepiece((line for line in ENGLISH * 100), 290, tmp_path).vocab_size == 290


@pytest.mark.parametrize("names", [
    dict(pad="<x>", bos="<x>"), dict(bos="<eos>"), dict(eos="a"), dict(eos=""), dict(pad="\n\n"),
    dict(pad="<unk>"), dict(bos="<0x0A>"), dict(bos="a b"), dict(eos="▁▁")])
def test_colliding_special_tokens_are_refused(names, tmp_path):
    with pytest.raises(ValueError): SpecialTokens(**names)
    (tmp_path / "c.yaml").write_text("special_tokens: " + json.dumps(names) + "\n")
    with pytest.raises(ConfigError, match="special token"): load_config(TokenizerConfig, tmp_path / "c.yaml")
