"""Encodes rendered text as token ids and labels. Labels follow from positions in the text, never from token ids.

Control tokens (bos, eos, <|im_end|>, ...) are the special tokens and all other added tokens that the template
writes, such as Qwen's <think>. They take effect only where the template wrote them. If a user's text spells one, such
as a forum post about "</s>", it is encoded as ordinary text. Otherwise anybody who writes into a data set could end a
turn or speak as the system. `data.control_tokens: parse` switches that off. To tell the two apart, the encoder uses a
copy of the tokenizer in which each control token has a private name with NUL characters, which data must not contain.
The copy reads the public spelling as text.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Encoding, Tokenizer
from transformers import PreTrainedTokenizerFast

from qlora.data.batches import IGNORE_INDEX
from qlora.errors import ModelError, first_line

MARKER = re.compile(r"<[|｜][^<>|｜\s]{1,40}[|｜]>|<(?:start|end)_of_\w+>")
"""text that looks like a control token of a chat template"""

# Brackets around the id of a control token that a user's text spells, while a template is rendered. They are
# Unicode noncharacters, so template logic does not react to them. If a user writes them, they stay ordinary text.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"


class CannotEncode(ModelError):
    """The tokenizer fails on a text, for example because a regular expression in it takes too long."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"base.model: the tokenizer fails on this text ({reason})")
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Part:
    """A span of a rendered document."""

    text: str
    trained: bool
    answer: bool = False
    """True for an answer, which follows a prompt"""


@dataclass(frozen=True, slots=True)
class Document:
    """A row rendered as text, ready to encode."""

    parts: tuple[Part, ...]
    bos: bool
    """True if bos must be put in front (the text does not contain it)"""
    eos: bool
    """True if a trained eos must be appended"""
    tallies: Counter[str] = field(default_factory=Counter)
    """what of the row is not trained or does not reach the model, by the names in `qlora.data.remarks`"""

    system: str | None = None
    """the system message of the row"""


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids and labels of a document."""

    input_ids: NDArray[np.int32]  # [T]
    labels: NDArray[np.int32]  # [T]; the token id where trained, else IGNORE_INDEX
    forged: bool
    """True if user text became a control token because the tokenizer cannot encode its spelling as text"""
    joined: int = 0
    """number of answers that begin within a token of their prompt"""


class Encoder:
    """Tokenizer for rendered documents in which only templates can write control tokens.

    Args:
        tokenizer: a fast tokenizer with an eos token. It is not changed.
        template: jinja source of the chat template, or empty.
        parse_controls: True makes the control tokens that a user's text spells take effect.

    Raises:
        ModelError: The tokenizer is not a fast one or has no eos token.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, template: str = "", *, parse_controls: bool = False
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(
                f"base.model: {type(tokenizer).__name__} is not a fast tokenizer, so it cannot map "
                "tokens to characters; use a model that has a tokenizer.json"
            )
        if tokenizer.eos_token_id is None:
            raise ModelError(
                "base.model: the tokenizer has no eos token, so the model cannot learn where an answer ends; "
                "set eos_token in its tokenizer_config.json"
            )
        self.bos_id: int | None = tokenizer.bos_token_id
        self.adds_bos = self.bos_id is not None and tokenizer("a")["input_ids"][:1] == [self.bos_id]
        """True if the tokenizer puts bos in front of plain text"""
        self._bos = np.array([] if self.bos_id is None else [self.bos_id], dtype=np.int32)
        self.eos_id: int = tokenizer.eos_token_id
        self._eos = np.array([self.eos_id], dtype=np.int32)
        self._backend = _plain_copy(tokenizer)
        self._controls = {
            token_id: token
            for token_id, token in self._backend.get_added_tokens_decoder().items()
            if token.special or token.content in template
        }
        self._parse_controls = parse_controls
        self._vocabulary = tokenizer.get_vocab()
        self._id_of = {token.content: token_id for token_id, token in self._controls.items()}
        # only the spelling of special tokens can be encoded as text
        self._backend.add_special_tokens(
            [_special(token) for token in self._controls.values() if not token.special]
        )
        self._backend.add_tokens([_renamed(token_id, token) for token_id, token in self._controls.items()])
        private = {self._backend.token_to_id(_name(token_id)): token_id for token_id in self._controls}
        # the highest id, not the number of tokens: ids can have holes
        self._public = np.arange(max([*self._vocabulary.values(), *private]) + 1, dtype=np.int32)
        self._public[list(private)] = list(private.values())
        self._is_control = np.zeros(len(self._public), dtype=bool)
        self._is_control[[*self._controls]] = True
        # Text can legitimately become unk, or an ordinary word that the tokenizer also uses as its pad token.
        harmless = {tokenizer.unk_token_id, tokenizer.pad_token_id} - {
            None,
            tokenizer.eos_token_id,
            self.bos_id,
        }
        self._is_control[[*harmless]] = False
        one, two = (self._backend.decode(self._backend.encode("x").ids * times) for times in (1, 2))
        self._splits = two == one * 2
        """True if two texts encoded apart are the same text as together: nothing is put before each"""
        spellings = [re.escape(content) for content in sorted(self._id_of, key=len, reverse=True)]
        self._longest = max(map(len, self._id_of), default=0)
        self._spelled = re.compile("|".join(spellings) or r"(?!)")
        self._guarded_or_spelled = re.compile("|".join([f"{_OPEN}(\\d+){_CLOSE}", *spellings]))

    def guard(self, text: str) -> str:
        """Hide the control tokens that a user's text spells, so that `encode` encodes them as text."""
        if self._parse_controls:
            return text
        return self._spelled.sub(lambda match: f"{_OPEN}{self._id_of[match[0]]}{_CLOSE}", text)

    def spelled_control(self, texts: Sequence[str]) -> str | None:
        """Return the first control token that a user's texts spell; None without one."""
        found = next((match for text in texts if (match := self._spelled.search(text))), None)
        return None if found is None else found[0]

    def unknown_marker(self, texts: Sequence[str]) -> str | None:
        """Return the first marker in a user's texts, such as <|im_start|>, that the tokenizer does not have."""
        found = (marker for text in texts for marker in MARKER.findall(text))
        return next((marker for marker in found if not self.knows(marker)), None)

    def last_control_end(self, text: str) -> int | None:
        """Return the end position of the last control token in a rendered text; None without one."""
        return max((match.end() for match in self._spelled.finditer(text)), default=None)

    def control_at_end(self, text: str) -> tuple[int, str] | None:
        """Return start and text of the control token at the end of a rendered text; None without one."""
        for start in range(max(0, len(text) - self._longest), len(text)):
            if text[start:] in self._id_of:
                return start, text[start:]
        return None

    def uncut(self, text: str, start: str) -> str:
        """Shorten the first part of a rendered text so that it does not end within a control token."""
        for match in self._spelled.finditer(text):
            if match.start() < len(start) < match.end():
                return text[: match.start()]
        return start

    def starts_with_bos(self, text: str) -> bool:
        """Return True if a rendered text starts with bos."""
        match = self._spelled.match(text)
        return match is not None and self._id_of[match[0]] == self.bos_id

    def ends_with_eos(self, text: str) -> bool:
        """Return True if a rendered text ends with eos."""
        control = self.control_at_end(text)
        return control is not None and self._id_of[control[1]] == self.eos_id

    def control_id(self, control: str) -> int:
        """Return the id of a control token."""
        return self._id_of[control]

    def knows(self, marker: str) -> bool:
        """Return True if the vocabulary has `marker` as one token."""
        return marker in self._vocabulary

    def encode(self, documents: Sequence[Document]) -> list[Encoded]:
        """Return token ids and labels of each document.

        Encoding a thousand documents per call is much faster than one. No token spans the last prompt of a document and
        its answer: where the tokenizer would join them (the space that ends "Capital: " and the answer "Paris"), the
        answer is encoded on its own, as it is generated. The messages before it are encoded together, as in its prompt.
        Tokenizers that put a space before every text are left as they are. `Encoded.joined` counts the answers that
        begin within a token of their prompt; that token is trained.
        """
        whole = [
            [replace(part, text=self._spell(part.text)) for part in document.parts] for document in documents
        ]
        encodings = self._tokens(whole)
        cut = [self._cut(parts, encoding) for parts, encoding in zip(whole, encodings, strict=True)]
        halves = [
            half for parts, end in zip(whole, cut, strict=True) if end for half in (parts[:end], parts[end:])
        ]
        apart = iter(self._tokens(halves))
        encoded = []
        for document, parts, encoding, end in zip(documents, whole, encodings, cut, strict=True):
            runs = [(parts, encoding)]
            if end:
                runs = [(parts[:end], next(apart)), (parts[end:], next(apart))]
            joined = len(_joins(parts[: end or len(parts)], encoding))
            encoded.append(self._assemble(document, runs, joined))
        return encoded

    def _tokens(self, texts: Sequence[Sequence[Part]]) -> list[Encoding]:
        joined = ["".join(part.text for part in parts) for parts in texts]
        try:
            return self._backend.encode_batch(joined, add_special_tokens=False)
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # a panic of tokenizers is no Exception
            raise CannotEncode(first_line(error)) from error

    def _cut(self, parts: Sequence[Part], encoding: Encoding) -> int:
        """Return the number of parts before the last answer if it must be encoded on its own, else 0."""
        last = max((number for number, part in enumerate(parts) if part.answer), default=0)
        if not (last and self._splits):
            return 0
        # A tokenizer can also group white space by what follows it.
        return last if last in _joins(parts, encoding) or parts[last - 1].text[-2:].isspace() else 0

    def _assemble(
        self, document: Document, runs: Sequence[tuple[Sequence[Part], Encoding]], joined: int
    ) -> Encoded:
        """Put the encoded parts of a document together, with bos and eos."""
        front = self._bos[: int(document.bos)]
        back = self._eos[: int(document.eos)]
        private = np.array([token for _, encoding in runs for token in encoding.ids], dtype=np.int32)
        trained = [self._trained(parts, encoding) for parts, encoding in runs]
        marks = np.concatenate([np.zeros(len(front), bool), *trained, np.ones(len(back), bool)])
        ids = np.concatenate([front, self._public[private], back])
        marks[:1] = False  # no token predicts the first one
        labels = np.where(marks, ids, np.int32(IGNORE_INDEX))
        forged = not self._parse_controls and bool(self._is_control[private].any())
        return Encoded(ids, labels, forged, joined)

    def _trained(self, parts: Sequence[Part], encoding: Encoding) -> NDArray[np.bool_]:
        """Mark the tokens of the trained parts."""
        lengths = [len(part.text) for part in parts]
        characters, end = sum(lengths), 0
        trained = np.zeros(len(encoding.ids), dtype=bool)
        for part, length in zip(parts, lengths, strict=True):
            start, end = end, end + length
            if part.trained:
                trained[_token_at(encoding, start, characters) : _token_from(encoding, end, characters)] = (
                    True
                )
        return trained

    def _spell(self, rendered: str) -> str:
        """Replace control tokens by their private names, and guarded spellings by the user's text."""

        def spelling(match: re.Match[str]) -> str:
            guarded = match[1]
            if guarded is None:
                return _name(self._id_of[match[0]])
            control = self._controls.get(int(guarded))
            return match[0] if control is None else control.content

        return self._guarded_or_spelled.sub(spelling, rendered)


def _plain_copy(tokenizer: PreTrainedTokenizerFast) -> Any:
    """Copy the tokenizer's backend; the copy adds no bos and reads spelled control tokens as text."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = None  # it would add bos and trim the offsets of tokens
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # encodes their spelling as text
    return backend


def _joins(parts: Sequence[Part], encoding: Encoding) -> list[int]:
    """Return the numbers of the answers that begin within a token of the part before them."""
    joined, end = [], 0
    for number, part in enumerate(parts):
        if number and part.answer:
            token = encoding.char_to_token(end)
            span = None if token is None else encoding.token_to_chars(token)
            if span is not None and span[0] < end:
                joined.append(number)
        end += len(part.text)
    return joined


def _name(token_id: int) -> str:
    return f"\0{token_id}\0"


def _special(token: AddedToken) -> AddedToken:
    return AddedToken(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=True,
    )


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
    """Return the index of the token that covers `character`, or the next character that the tokenizer does not drop.

    characters: length of the text. The result is the number of tokens if no such character is left.
    """
    for position in range(character, characters):
        token = encoding.char_to_token(position)
        if token is not None:
            return int(token)
    return len(encoding.ids)


def _token_from(encoding: Encoding, character: int, characters: int) -> int:
    """Return the index of the first token that starts at `character` or later; the number of tokens if none does.

    characters: length of the text.
    """
    token = _token_at(encoding, character, characters)
    while token < len(encoding.ids):
        span = encoding.token_to_chars(token)
        if span is None or span[0] >= character:
            break
        token += 1
    return token
