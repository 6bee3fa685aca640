"""Creates tokenizers of each kind that models use. Nothing is downloaded."""

import re
from functools import cache

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "Below is an instruction that describes a task. Write a response that completes the request.",
    "### Instruction: Give three tips for staying healthy.\n\n### Response: Eat well, sleep well and move.",
    "Question: What are the three primary colours?\nAnswer: Red, blue and yellow.",
    "the cat sat on the mat and the dog sat on the log, <|im_start|>user assistant system<|im_end|>",
] * 4


@cache
def _byte_level() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return str(tokenizer.to_str())


def byte_level(
    *,
    bos: bool = False,
    pad: str | None = None,
    chat_template: str | None = None,
    chatml: bool = False,
    greedy: bool = False,
) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer, as GPT-2, Llama 3 and Qwen use. eos is </s>.

    `bos` puts <s> before plain text. `chatml` adds ChatML's control tokens; with `greedy` they swallow the white space
    after them, as Phi 3's do.
    """
    tokenizer = Tokenizer.from_str(_byte_level())
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    specials = ["<s>", "</s>"] + (["<|im_start|>", "<|im_end|>"] if chatml else [])
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, rstrip=greedy) for name in specials])
    if bos:
        _put_bos_in_front(tokenizer)
    return _wrapped(tokenizer, pad=pad, chat_template=chat_template)


_MARKER = re.compile(r"</?[|｜]?[\w▁]+[|｜]?>|\[/?[A-Z_]+\]")


def with_markers_of(template: str) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer that has the markers of a chat template as tokens, special if they have bars."""
    tokenizer = byte_level(chatml=True, chat_template=template)
    roles = [
        f"<|{role}|>" for role in ("system", "user", "assistant")
    ]  # put together from the role by some templates
    names = dict.fromkeys([*_MARKER.findall(template), *roles])
    markers = [name for name in names if name not in tokenizer.get_vocab()]
    tokenizer.add_tokens(
        [AddedToken(name, normalized=False, special=bool({*"|｜"} & {*name})) for name in markers]
    )
    return tokenizer


def sentencepiece(*, pad: str | None = None, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Return a BPE tokenizer with ▁ for spaces, a byte fallback and bos before the text, as Llama 1 and 2 use."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    plain = _without_special_bytes(tokenizer)
    _put_bos_in_front(plain)
    return _wrapped(plain, pad=pad, chat_template=chat_template, unk_token="<unk>")


def words() -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words, one of them spelled like eos, so that it cannot write "</s>" as text."""
    vocabulary = {"<unk>": 0, "</s>": 1, "hello": 2, "world": 3}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def _without_special_bytes(tokenizer: Tokenizer) -> Tokenizer:
    """Remove the byte tokens from the special tokens: the trainer makes every token in its list special."""
    import json

    layout = json.loads(tokenizer.to_str())
    layout["added_tokens"] = [
        token for token in layout["added_tokens"] if not token["content"].startswith("<0x")
    ]
    return Tokenizer.from_str(json.dumps(layout))


def _put_bos_in_front(tokenizer: Tokenizer) -> None:
    bos = ("<s>", tokenizer.token_to_id("<s>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])


def _wrapped(
    tokenizer: Tokenizer, *, pad: str | None, chat_template: str | None, **names: str
) -> PreTrainedTokenizerFast:
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token=pad, **names
    )
    wrapped.chat_template = chat_template
    return wrapped
