"""Tokenizers as llama.cpp reads them: the same tokens, or an error. (test_export_llama_cpp.py asks llama.cpp.)"""

import json
from collections.abc import Callable
from itertools import pairwise

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from tokenizers_for_tests import byte_level, sentencepiece, words
from transformers import PreTrainedTokenizerFast

from qlora.errors import ModelError
from qlora.export.gguf_tokenizer import BYTE, CONTROL, NORMAL, UNUSED, USER_DEFINED, Vocabulary

PIECES = ["he", "ll", "hell", "lo", "▁w", "or", "▁wor", "llo", "hello", "▁h", "▁hell", "ld"]


def from_pieces(first: bool = False) -> PreTrainedTokenizerFast:
    """Return a tokenizer with the merges that transformers takes from a SentencePiece model with these pieces."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *bytes_, *PIECES, *"▁helowrd"]
    known = {token: number for number, token in enumerate(tokens)}
    cuts = [(piece[:i], piece[i:]) for piece in PIECES for i in range(1, len(piece))]
    merges = [pair for pair in cuts if {*pair} <= known.keys()]
    made = Tokenizer(models.BPE(known, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if first:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.add_special_tokens(["<s>", "</s>"])
    made.add_tokens([AddedToken("▁▁", normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def as_llama_cpp(vocabulary: Vocabulary, text: str) -> list[int]:
    """Join neighbours whose text is a token, the highest score first, then the leftmost; the rest is bytes."""
    ids = {token: number for number, token in enumerate(vocabulary.tokens)}
    parts = list("▁" * (vocabulary.space != "never") + text.replace(" ", "▁"))
    while pairs := [
        (-vocabulary.scores[ids[a + b]], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ids
    ]:
        _, at = min(pairs)
        parts[at : at + 2] = ["".join(parts[at : at + 2])]
    return [
        number
        for part in parts
        for number in ([ids[part]] if part in ids else [ids[f"<0x{byte:02X}>"] for byte in part.encode()])
    ]


@pytest.mark.parametrize("first", [False, True])
def test_scores_merge_as_the_merges_do(first: bool) -> None:
    tokenizer = from_pieces(first)
    found = Vocabulary.of(tokenizer, 300)
    assert found.space == ("first" if first else "always")
    for text in ("hello world", "hellohell lo", "owo héllo", "lllllo wor hell"):
        assert as_llama_cpp(found, text) == tokenizer.encode(text, add_special_tokens=False)
    assert (
        found.tokens[tokenizer.convert_tokens_to_ids("▁▁")] == "  "
    )  # found in the text, before it is split


def test_tokens_of_all_kinds_and_rows_without_one() -> None:
    found = Vocabulary.of(from_pieces(), 300)
    kinds = dict(zip(found.tokens, found.kinds, strict=True))
    assert [kinds[name] for name in ("<s>", "<0x0A>", "hello", "  ", "[PAD299]")] == [
        CONTROL, BYTE, NORMAL, USER_DEFINED, UNUSED,
    ]  # fmt: skip
    assert (found.ids["bos"], found.ids["eos"], found.ids["unk"]) == (1, 2, 0)
    assert Vocabulary.of(from_pieces(), 300, closing="<s>").ids["eos"] == 1
    assert [Vocabulary.of(byte_level(bos=bos), 402).adds_bos for bos in (True, False)] == [True, False]


def changed(change: Callable[[PreTrainedTokenizerFast], object]) -> PreTrainedTokenizerFast:
    tokenizer = byte_level()
    change(tokenizer)
    return tokenizer


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (words, "its model is WordLevel, and llama.cpp's is BPE"),
        (sentencepiece, "are not merged, and llama.cpp merges all neighbours"),
        (lambda: byte_level(greedy=True, chatml=True), r"<\|im_start\|> and 1 more: these tokens take the white space"),
        (lambda: changed(lambda t: t.add_tokens([f"more{i}" for i in range(160)])), "it has 562 tokens"),
        (
            lambda: changed(
                lambda t: setattr(t.backend_tokenizer, "pre_tokenizer", pre_tokenizers.Split(Regex("a"), "isolated"))
            ),
            r"llama.cpp does not split texts as it does \(Split\)",
        ),
        (
            lambda: changed(lambda t: setattr(t.backend_tokenizer, "normalizer", normalizers.Lowercase())),
            "it changes texts by Lowercase",
        ),
        (lambda: changed(lambda t: setattr(t.backend_tokenizer.model, "ignore_merges", True)), "does not split"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused(
    make: Callable[[], PreTrainedTokenizerFast], said: str
) -> None:
    with pytest.raises(ModelError, match=f"cannot be written as GGUF: .*{said}"):
        Vocabulary.of(make(), 510)


def test_merges_in_an_order_that_no_score_gives_are_refused() -> None:
    tokenizer = from_pieces()
    layout = json.loads(tokenizer.backend_tokenizer.to_str())
    layout["model"]["merges"].reverse()
    layout["model"]["merges"].sort(key=lambda pair: len(pair[0]))  # those of one token are no longer together
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(layout)))
    with pytest.raises(ModelError, match="other merges come between those of"):
        Vocabulary.of(made, 300)
