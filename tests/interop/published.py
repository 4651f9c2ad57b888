"Published tokenizers of each family, generated: one directory each."
import io
import json
from pathlib import Path

import sentencepiece
from tokenizers import (
    AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers)

TEXTS = ["the old gull flies over the harbour and counts the boats",
         "a small boat waits for the tide and the wind",
         "user assistant system name a bird: 1234 times\n\nWho? Who counts!"] * 40
CHATML = ("{% for m in messages %}"
          "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
FAMILIES = {}


def family(name, *args, **kwargs):
    "Register a function that fills a directory."
    def register(make):
        FAMILIES[name] = lambda folder: make(folder, *args, **kwargs)
        return make
    return register


def put(folder, name, value): Path(folder, name).write_text(json.dumps(value, ensure_ascii=False))


def flags(content, special=True, **more):
    return {"content": content, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False,
            "special": special, **more}


def config(**more):
    return {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<|im_end|>",
            **more}


# tokenizer.model


def model(**more):
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=content,
        minloglevel=2,
        **{
            **dict(
                model_type="bpe",
                vocab_size=330,
                byte_fallback=True,
                normalization_rule_name="identity",
                character_coverage=1.0,
                remove_extra_whitespaces=False,
                unk_id=0,
                bos_id=1,
                eos_id=2,
                pad_id=-1,
            ),
            **more,
        },
    )
    return content.getvalue()


def spm(folder, config, added=None, special=None, **more):
    Path(folder, "tokenizer.model").write_bytes(model(**more))
    names = {"<|im_start|>": 330, "<|im_end|>": 331} if added is None else added
    if names: put(folder, "added_tokens.json", names)
    if special: put(folder, "special_tokens_map.json", special)
    put(folder, "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", **config})


LISTED = {str(i): flags(name) for i, name in [(0, "<unk>"), (1, "<s>"), (2, "</s>"), (330, "<|im_start|>"),
                                              (331, "<|im_end|>")]}
for legacy in (True, False, None):
    for prefix in (True, False, None):
        keys = {"legacy": legacy, "add_prefix_space": prefix, "add_bos_token": True,
                "eos_token": "<|im_end|>", "added_tokens_decoder": LISTED}
        family(f"spm, legacy {legacy}, prefix {prefix}",
               {k: v for k, v in keys.items() if v is not None})(spm)
family("spm with bos and eos", {"add_bos_token": True, "add_eos_token": True, "eos_token": "<|im_end|>",
                                "added_tokens_decoder": LISTED})(spm)
family("spm, flags in a map", {"add_bos_token": True}, special={
    "bos_token": flags("<s>"), "eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})(spm)
family("spm with user-defined symbols", {"eos_token": "<|im_end|>"}, added={},
       user_defined_symbols=["\n", "<|x|>"], control_symbols=["<|im_start|>", "<|im_end|>"])(spm)


# tokenizer.json converted from SentencePiece


def metaspace(folder, pre, config, norm=None, post=None, more=()):
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre, decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    if norm: tokenizer.normalizer = norm
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=360, show_progress=False, special_tokens=special)
    tokenizer.train_from_iterator(TEXTS, trainer)
    plain = json.loads(tokenizer.to_str())
    plain["added_tokens"] = [token
                             for token in plain["added_tokens"] if not token["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(plain))
    tokenizer.add_tokens([AddedToken("<|im_start|>", normalized=False, special=True),
                     AddedToken("<|im_end|>", normalized=False, special=True), *more])
    if post: tokenizer.post_processor = post
    tokenizer.save(str(Path(folder, "tokenizer.json")))
    put(folder, "tokenizer_config.json", config)


BOS = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
BOTH = processors.TemplateProcessing(single="<s> $A </s>", pair="<s> $A $B",
                                     special_tokens=[("<s>", 1), ("</s>", 2)])
PREPEND = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
for scheme in ("always", "first", "never"):
    for split in (False, True):
        family(f"Metaspace {scheme}, split {split}", pre_tokenizers.Metaspace("▁", scheme, split), config(),
               post=BOS)(metaspace)
family("Metaspace as LlamaTokenizer", pre_tokenizers.Metaspace("▁", "always", False),
       config(tokenizer_class="LlamaTokenizer", add_bos_token=False), post=BOS)(metaspace)
family("Prepend", None, config(), norm=PREPEND, post=BOS)(metaspace)
family("Prepend as LlamaTokenizerFast", None, config(tokenizer_class="LlamaTokenizerFast", legacy=False),
       norm=PREPEND, post=BOTH)(metaspace)
family("Prepend as legacy LlamaTokenizer", None, config(tokenizer_class="LlamaTokenizer", legacy=True),
       norm=PREPEND, post=BOTH)(metaspace)
family("flags", pre_tokenizers.Metaspace("▁", "first", False), config(),
       more=[AddedToken("<|l|>", lstrip=True, special=True), AddedToken("<|r|>", rstrip=True, special=True),
             AddedToken("<think>", normalized=False), AddedToken("<|w|>", single_word=True, special=True),
             AddedToken("<|N|>", normalized=True, special=True)])(metaspace)
family("rstrip on the end of a turn", pre_tokenizers.Metaspace("▁", "first", False),
       config(added_tokens_decoder={"361": flags("<|im_end|>", rstrip=True),
                                   "360": flags("<|im_start|>", lstrip=True)}))(metaspace)


# tokenizer.json: byte-level BPE, WordPiece, Unigram


def byte_level(folder, kind, norm=None, pre=None, post=None, **more):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if norm: tokenizer.normalizer = norm
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=330, show_progress=False, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"]))
    if post: tokenizer.post_processor = post
    tokenizer.save(str(Path(folder, "tokenizer.json")))
    put(folder, "tokenizer_config.json", {"tokenizer_class": kind, "bos_token": "<|endoftext|>",
                                          "eos_token": "<|im_end|>", **more})


DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(True),
                                  pre_tokenizers.ByteLevel(add_prefix_space=False)])
family("ByteLevel", "PreTrainedTokenizerFast")(byte_level)
family("ByteLevel with a space in front", "PreTrainedTokenizerFast",
       pre=pre_tokenizers.ByteLevel(add_prefix_space=True))(byte_level)
family("ByteLevel as LlamaTokenizer", "LlamaTokenizer")(byte_level)
family(
    "ByteLevel with bos",
    "TokenizersBackend",
    post=processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]),
        ]
    ),
)(byte_level)
family("GPT2Tokenizer", "GPT2Tokenizer", add_bos_token=False)(byte_level)
family("GPT2TokenizerFast with digits", "GPT2TokenizerFast", pre=DIGITS)(byte_level)
family("Qwen2Tokenizer", "Qwen2Tokenizer", norm=normalizers.NFC(), bos_token=None,
       pad_token="<|endoftext|>")(byte_level)


@family("WordPiece")
def word_piece(folder):
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(
        TEXTS,
        trainers.WordPieceTrainer(
            vocab_size=200,
            show_progress=False,
            special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "<|im_start|>", "<|im_end|>"],
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]",
                                                        special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokenizer.save(str(Path(folder, "tokenizer.json")))
    put(folder, "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "cls_token": "[CLS]",
                                          "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]",
                                          "eos_token": "<|im_end|>"})


@family("Unigram")
def unigram(folder):
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Nmt()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", "always", True)
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        TEXTS,
        trainers.UnigramTrainer(
            vocab_size=120,
            show_progress=False,
            unk_token="<unk>",
            special_tokens=["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        ),
    )
    tokenizer.save(str(Path(folder, "tokenizer.json")))
    put(folder, "tokenizer_config.json", config())


def publish(name, folder, template=CHATML):
    "A directory with the tokenizer of a family, a chat template, and the config.json of a Llama."
    Path(folder).mkdir(parents=True)
    FAMILIES[name](folder)
    Path(folder, "chat_template.jinja").write_text(template)
    put(folder, "config.json", {"model_type": "llama", "vocab_size": 512,
                                "architectures": ["LlamaForCausalLM"]})
    return Path(folder)
