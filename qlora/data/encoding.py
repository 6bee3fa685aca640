"""Text -> token ids and labels. What is trained is decided by position, never by the id of a token.

Control tokens (bos, eos, <|im_end|>, ...) take effect only where a template wrote them. Where a user's own
text spells one, say a forum post about "</s>", it is ordinary text: otherwise anybody who writes into a data
set could end a turn or speak as the system. The two are told apart by spelling: the encoder here is a copy of
the tokenizer that knows each control token by a private name with NUL characters, which no data may contain,
and reads the public spelling as text.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Encoding, Tokenizer
from transformers import PreTrainedTokenizerFast

from qlora.data.batches import IGNORE_INDEX
from qlora.errors import ModelError

# Stand for a control token spelled in a user's text while a template is rendered. Unicode noncharacters, so
# that no template's logic trips over them; a user who writes them gets the same, harmless: text.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a rendered document."""

    text: str
    trained: bool


@dataclass(frozen=True, slots=True)
class Document:
    """A row rendered as text, ready to encode."""

    parts: tuple[Part, ...]
    bos: bool
    """the tokenizer's bos is to stand in front (the text does not write one itself)"""
    eos: bool
    """the tokenizer's eos is to follow, trained"""
    untrained_answers: int = 0
    """answers that are context only"""

    @property
    def spells_control(self) -> bool:
        """Whether the user's text spells a control token, which is encoded as ordinary text."""
        return any(_OPEN in part.text for part in self.parts)


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of a document, and which of them are learned."""

    input_ids: NDArray[np.int32]  # [T]
    labels: NDArray[np.int32]  # [T]; the id where trained, else IGNORE_INDEX
    forged: bool
    """the text itself became a control token: this tokenizer cannot write its spelling as ordinary text"""


class Encoder:
    """A tokenizer for documents whose control tokens are certain.

    Args:
        tokenizer: a fast tokenizer with an eos token. It is not changed.

    Raises:
        ModelError: the tokenizer is not a fast one, or has no eos.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(
                f"base.model: {type(tokenizer).__name__} is not a fast tokenizer, so it cannot say which "
                "characters a token stands for; use a model that has a tokenizer.json"
            )
        if tokenizer.eos_token_id is None:
            raise ModelError(
                "base.model: the tokenizer has no eos token, so the model could never learn where an answer "
                "ends; name one in its tokenizer_config.json (eos_token)"
            )
        self.bos_id: int | None = tokenizer.bos_token_id
        self.adds_bos = self.bos_id is not None and tokenizer("a")["input_ids"][:1] == [self.bos_id]
        """the tokenizer puts bos in front of plain text"""
        self._bos = np.array([] if self.bos_id is None else [self.bos_id], dtype=np.int32)
        self.eos_id: int = tokenizer.eos_token_id
        self._eos = np.array([self.eos_id], dtype=np.int32)
        self._backend = _plain_copy(tokenizer)
        self._controls = {
            token_id: token
            for token_id, token in self._backend.get_added_tokens_decoder().items()
            if token.special
        }
        self._id_of = {token.content: token_id for token_id, token in self._controls.items()}
        self._backend.add_tokens([_renamed(token_id, token) for token_id, token in self._controls.items()])
        private = {self._backend.token_to_id(_name(token_id)): token_id for token_id in self._controls}
        self._public = np.arange(max([self._backend.get_vocab_size(), *private]) + 1, dtype=np.int32)
        self._public[list(private)] = list(private.values())
        self._is_control = np.zeros(len(self._public), dtype=bool)
        self._is_control[[*self._controls]] = True
        # Text may well become unk, or the word that a tokenizer without a pad token borrows as one.
        harmless = {tokenizer.unk_token_id, tokenizer.pad_token_id} - {
            None,
            tokenizer.eos_token_id,
            self.bos_id,
        }
        self._is_control[[*harmless]] = False
        spellings = [re.escape(content) for content in sorted(self._id_of, key=len, reverse=True)]
        self._spelled = re.compile("|".join(spellings) or r"(?!)")
        self._guarded_or_spelled = re.compile("|".join([f"{_OPEN}(\\d+){_CLOSE}", *spellings]))

    def guard(self, text: str) -> str:
        """A user's text with the control tokens it spells hidden; `encode` writes them as text."""
        return self._spelled.sub(lambda match: f"{_OPEN}{self._id_of[match[0]]}{_CLOSE}", text)

    def find_control(self, text: str, start: int = 0) -> re.Match[str] | None:
        """The first control token in a rendered text, from `start` on."""
        return self._spelled.search(text, start)

    def last_control_end(self, text: str, start: int) -> int | None:
        """Where the last control token from `start` on ends in a rendered text; None if there is none."""
        return max((match.end() for match in self._spelled.finditer(text, start)), default=None)

    def starts_with_bos(self, text: str) -> bool:
        """Whether a rendered text writes its own bos."""
        match = self._spelled.match(text)
        return match is not None and self._id_of[match[0]] == self.bos_id

    def encode(self, documents: Sequence[Document]) -> list[Encoded]:
        """Token ids and labels of each document; a thousand at a time is much faster than one.

        A token that reaches from an untrained part into a trained one is trained: part of an answer is in it.
        """
        spelled = [[self._spell(part.text) for part in document.parts] for document in documents]
        encodings = self._backend.encode_batch(
            ["".join(parts) for parts in spelled], add_special_tokens=False
        )
        return [
            self._assemble(document, parts, encoding)
            for document, parts, encoding in zip(documents, spelled, encodings, strict=True)
        ]

    def _assemble(self, document: Document, spelled: list[str], encoding: Encoding) -> Encoded:
        front = self._bos[: int(document.bos)]
        back = self._eos[: int(document.eos)]
        private = np.array(encoding.ids, dtype=np.int32)
        ids = np.concatenate([front, self._public[private], back])
        trained = np.zeros(len(ids), dtype=bool)
        trained[len(ids) - len(back) :] = True
        characters, end = sum(map(len, spelled)), 0
        for part, text in zip(document.parts, spelled, strict=True):
            start, end = end, end + len(text)
            if part.trained:
                first = _token_at(encoding, start, characters)
                trained[len(front) + first : len(front) + _token_from(encoding, end, characters)] = True
        trained[:1] = False  # nothing stands before the first token to predict it from
        labels = np.where(trained, ids, np.int32(IGNORE_INDEX))
        return Encoded(ids, labels, forged=bool(self._is_control[private].any()))

    def _spell(self, rendered: str) -> str:
        """Public spellings of control tokens -> private names; guarded ones -> what the user wrote."""

        def spelling(match: re.Match[str]) -> str:
            guarded = match[1]
            if guarded is None:
                return _name(self._id_of[match[0]])
            control = self._controls.get(int(guarded))
            return match[0] if control is None else control.content

        return self._guarded_or_spelled.sub(spelling, rendered)


def _plain_copy(tokenizer: PreTrainedTokenizerFast) -> Any:
    """The tokenizer's own machine, but it adds no bos and reads the spelling of a control token as text."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = None  # it adds bos, and it trims the offsets of tokens
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # as text, that is
    return backend


def _name(token_id: int) -> str:
    return f"\0{token_id}\0"


def _renamed(token_id: int, token: AddedToken) -> AddedToken:
    return AddedToken(
        _name(token_id),
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=False,
        special=False,
    )


def _token_at(encoding: Encoding, character: int, characters: int) -> int:
    """The first token that holds this character or, where a tokenizer drops some, the next one it keeps."""
    for position in range(character, characters):
        token = encoding.char_to_token(position)
        if token is not None:
            return int(token)
    return len(encoding.ids)


def _token_from(encoding: Encoding, character: int, characters: int) -> int:
    """The first token that starts at this character or later."""
    token = _token_at(encoding, character, characters)
    while token < len(encoding.ids):
        span = encoding.token_to_chars(token)
        if span is None or span[0] >= character:
            break
        token += 1
    return token
