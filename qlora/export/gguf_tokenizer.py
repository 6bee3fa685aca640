"""Tokenizer of a model as llama.cpp reads it, exactly the same or refused.

llama.cpp has two tokenizers for the families that are exported:

    gpt2    byte-level BPE by its merges, after a split of the text that `tokenizer.ggml.pre` names (Llama 3, Qwen)
    llama   SentencePiece's BPE by the scores of its tokens, with ▁ for a space and bytes as a fallback (Llama 2, Gemma)

A split that llama.cpp does not have, or merges that no scores can express, would change how texts are read, and thus
what the model was trained on.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerFast as Tokenizer

from qlora.errors import ModelError, listed

if TYPE_CHECKING:
    from gguf import GGUFWriter

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""llama.cpp's kinds of tokens"""

_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_2 = _LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTES, _BYTES_AND_WORDS = ("ByteLevel", False), ("ByteLevel", True)

SPLITS: Mapping[tuple[tuple[tuple[str, Any], ...], bool], str] = {
    ((_BYTES_AND_WORDS,), False): "gpt-2",
    ((("Digits", True), _BYTES_AND_WORDS), False): "smollm",
    ((("Split", _LLAMA_3), _BYTES), True): "llama-bpe",
    ((("Split", _LLAMA_3), _BYTES), False): "smaug-bpe",
    ((("Split", _QWEN_2), _BYTES), False): "qwen2",
    ((("Split", _TEKKEN), _BYTES), True): "tekken",
}
"""llama.cpp's name for the steps that split a text, and for whether a whole word that is a token skips the merges"""

SPACE = "▁"


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as llama.cpp reads it."""

    model: str
    """gpt2 or llama"""
    pre: str
    """name of the split"""
    tokens: list[str]
    kinds: list[int]
    merges: list[str] = field(default_factory=list)
    """of gpt2"""
    scores: list[float] = field(default_factory=list)
    """of llama: the higher the earlier"""
    ids: Mapping[str, int] = field(default_factory=dict)
    """of bos, eos, unk and pad, where there is one"""
    adds_bos: bool = False
    adds_eos: bool = False
    space: str | None = None
    """of llama: always if a space comes before each text between control tokens, first if only before a text at the
    very beginning, which llama.cpp cannot tell apart, or never"""

    @classmethod
    def of(cls, tokenizer: Tokenizer, rows: int, closing: str | None = None) -> "Vocabulary":
        """Translate a tokenizer.

        Args:
            tokenizer: the tokenizer of the run.
            rows: rows of the embedding; those without a token get unused ones.
            closing: token that ends an answer; None: the tokenizer's eos.

        Raises:
            ModelError: llama.cpp has no such tokenizer.
        """
        layout = json.loads(tokenizer.backend_tokenizer.to_str())
        tokens, kinds = _tokens(layout, tokenizer, rows)
        ids = {
            name: number
            for name in ("bos", "eos", "unk", "pad")
            if (number := getattr(tokenizer, f"{name}_token_id")) is not None
        }
        if closing is not None:
            ids["eos"] = tokenizer.convert_tokens_to_ids(closing)
        model = layout["model"]
        if model["type"] != "BPE":
            raise _refused(f"its model is {model['type']}, and llama.cpp's is BPE")
        if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix") or model.get("dropout"):
            raise _refused("its BPE marks the parts of words, or drops merges")
        merges = [
            tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]
        ]
        bos, eos = _around(tokenizer)
        if model.get("byte_fallback"):
            space = _sentencepiece_space(layout)
            scores = _scores(tokens, kinds, merges)
            return cls("llama", "default", tokens, kinds, [], scores, ids, bos, eos, space)
        pre = _split_name(layout)
        joined = [" ".join(pair) for pair in merges]
        return cls("gpt2", pre, tokens, kinds, joined, [], ids, bos, eos)

    def write(self, writer: "GGUFWriter") -> None:
        """Add the tokenizer to a GGUF file."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.kinds)
        if self.scores:
            writer.add_token_scores(self.scores)
        if self.merges:
            writer.add_token_merges(self.merges)
        for name, number in self.ids.items():
            getattr(writer, f"add_{name}_token_id")(number)
        writer.add_add_bos_token(self.adds_bos)
        writer.add_add_eos_token(self.adds_eos)
        if self.space is not None:
            writer.add_add_space_prefix(self.space != "never")


def _refused(reason: str) -> ModelError:
    return ModelError(
        f"the tokenizer cannot be written as GGUF: {reason}. The model would read texts in other tokens than in "
        "training. Convert a merged model (`qlora merge`) with a program that knows this tokenizer"
    )


def _tokens(layout: dict[str, Any], tokenizer: Tokenizer, rows: int) -> tuple[list[str], list[int]]:
    """Return the token of each row of the embedding, and its kind."""
    vocab = tokenizer.get_vocab()
    if (beyond := max(vocab.values()) + 1) > rows:
        raise _refused(f"it has {beyond} tokens, and the embedding {rows} rows")
    tokens, kinds = [f"[PAD{number}]" for number in range(rows)], [UNUSED] * rows
    for token, number in vocab.items():
        tokens[number], kinds[number] = token, NORMAL
    if layout["model"].get("byte_fallback"):
        for byte in range(256):
            if (number := vocab.get(f"<0x{byte:02X}>", -1)) < 0:
                raise _refused(f"it lacks the token <0x{byte:02X}>")
            kinds[number] = BYTE
    odd = []
    for added in layout["added_tokens"]:
        number = added["id"]
        kinds[number] = CONTROL if added["special"] else USER_DEFINED
        if not added["special"] and layout["model"].get("byte_fallback"):
            tokens[number] = tokens[number].replace(SPACE, " ")  # llama.cpp finds these in the text itself
        if added["single_word"] or added["lstrip"] or added["rstrip"]:
            odd.append(added["content"])
    if odd:
        raise _refused(f"{listed(odd)}: these tokens take the white space beside them, or only whole words")
    if tokenizer.unk_token_id is not None:
        kinds[tokenizer.unk_token_id] = UNKNOWN
    return tokens, kinds


def _around(tokenizer: Tokenizer) -> tuple[bool, bool]:
    """Return whether bos comes before a plain text, and eos after it."""
    with_them = tokenizer.encode("a")
    inner = tokenizer.encode("a", add_special_tokens=False)
    bos = [tokenizer.bos_token_id] if with_them[:1] == [tokenizer.bos_token_id] != inner[:1] else []
    eos = [tokenizer.eos_token_id] if with_them[-1:] == [tokenizer.eos_token_id] != inner[-1:] else []
    if with_them != [*bos, *inner, *eos]:
        added = listed(tokenizer.convert_ids_to_tokens([one for one in with_them if one not in inner]))
        raise _refused(f"it puts {added} around a text, not only bos and eos")
    return bool(bos), bool(eos)


def _split_name(layout: dict[str, Any]) -> str:
    """Return llama.cpp's name for the way in which a byte-level tokenizer splits a text."""
    normalizer, splitter = layout["normalizer"], layout["pre_tokenizer"]
    if normalizer is not None and normalizer["type"] != "NFC":
        raise _refused(f"it changes texts by {normalizer['type']}")
    steps = []
    for step in _steps(splitter):
        kind = step["type"]
        if kind == "ByteLevel" and not step["add_prefix_space"]:
            steps.append((kind, step["use_regex"]))
        elif kind == "Digits":
            steps.append((kind, step["individual_digits"]))
        elif kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            steps.append((kind, step["pattern"].get("Regex")))
        else:
            steps.append((kind, json.dumps(step)))
    name = SPLITS.get((tuple(steps), bool(layout["model"]["ignore_merges"])))
    if name is None:
        shown = ", ".join(kind for kind, _ in steps) or "nothing"
        raise _refused(f"llama.cpp does not split texts as it does ({shown})")
    return name


def _steps(splitter: dict[str, Any] | None) -> list[dict[str, Any]]:
    if splitter is None:
        return []
    return list(splitter["pretokenizers"]) if splitter["type"] == "Sequence" else [splitter]


def _sentencepiece_space(layout: dict[str, Any]) -> str:
    """Return when a tokenizer with ▁ for a space puts one before a text: always, first or never."""
    normalizer, splitter = layout["normalizer"], layout["pre_tokenizer"]
    changes = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    space, replaces = "never", False
    for change in changes:
        if change["type"] == "Prepend" and change["prepend"] == SPACE and not replaces:
            space = "always"
        elif (
            change["type"] == "Replace"
            and change["pattern"] == {"String": " "}
            and change["content"] == SPACE
        ):
            replaces = True
        else:
            raise _refused(f"it changes texts by {change['type']}")
    for step in _steps(splitter):
        if step["type"] == "Metaspace" and step["replacement"] == SPACE and not (step["split"] or replaces):
            space, replaces = step["prepend_scheme"], True
        elif not (step["type"] == "Split" and step["pattern"] == {"String": " "} and replaces):
            raise _refused(f"it splits texts by {step['type']}")
    if not replaces:
        raise _refused(f"it does not write a space as {SPACE}")
    return space


def _scores(tokens: Sequence[str], kinds: Sequence[int], merges: Sequence[tuple[str, ...]]) -> list[float]:
    """Return the score of each token with which llama.cpp merges in the order of `merges`.

    llama.cpp joins any two neighbours whose text is a token, the one with the highest score first. That is the same as
    the merges if each token has all of its splits among them, one after another, as in tokenizers made from a
    SentencePiece model.
    """
    ranks: dict[str, list[int]] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), []).append(rank)
    pairs = set(merges)
    reachable = {token for token in tokens if len(token) == 1} | ranks.keys()
    for token, kind in zip(tokens, kinds, strict=True):
        if kind != NORMAL or len(token) == 1:
            continue
        own = ranks.get(token, [])
        if own and own[-1] - own[0] + 1 != len(own):
            raise _refused(
                f"other merges come between those of {token!r}, so no score of the token can order them"
            )
        for place in range(1, len(token)):
            left, right = token[:place], token[place:]
            if left in reachable and right in reachable and (left, right) not in pairs:
                raise _refused(
                    f"{left!r} and {right!r} are not merged, and llama.cpp merges all neighbours that make a token"
                )
    lowest = -float(len(merges)) - 1
    return [-float(ranks[token][0]) if token in ranks else lowest for token in tokens]
