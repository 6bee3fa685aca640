"""Questions that nobody has answered yet, posed as the rows of a recipe's data were."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from qlora.data.batches import IGNORE_INDEX
from qlora.data.encoding import Document, Encoder
from qlora.data.layout import Layout, template_name
from qlora.data.sources import read
from qlora.data.templates import template_text
from qlora.errors import DataError
from qlora.formats import FORMATS, BadRow, Completion, Conversation, Message, Row
from qlora.recipe import Data

_ROWS = 200
"""rows that are looked at to learn whether a data set holds conversations"""

_FIRST, _ANSWER, _SECOND = "first question", "first answer", "second question"


class Prompts:
    """Poses questions to a model that was trained on a recipe's `data` section.

        >>> prompts = Prompts(recipe.data, tokenizer)
        >>> ids = prompts.encode("And on Sunday?", before=messages)

    Raises DataError if the template cannot be used.
    """

    def __init__(self, section: Data, tokenizer: PreTrainedTokenizerFast) -> None:
        self._encoder = Encoder(tokenizer)
        self._layout = Layout(section, tokenizer, self._encoder)
        self._section = section
        name = template_name(section, tokenizer)
        self.template = None if name is None else self._with_bos(template_text(name))
        """the jinja source that poses the same prompts with transformers; None is the tokenizer's own"""
        self.stop_ids = answer_ends(self._layout, self._encoder)
        """tokens that end an answer: eos, and what the template closes an answer with"""

    def encode(self, text: str, before: Sequence[Message] = ()) -> list[int]:
        """Token ids that ask for an answer to `text`.

        before: the conversation so far, as messages with `role` and `content`.

        Raises DataError if the text holds a NUL character or the template refuses the conversation.
        """
        if "\0" in text:
            raise DataError("the prompt holds a NUL character")
        try:
            document = self._layout.prompt(text, before)
        except BadRow as error:
            raise DataError(f"the prompt is {error}") from error
        (encoded,) = self._encoder.encode([document])
        return [int(token) for token in encoded.input_ids]

    @cached_property
    def can_follow(self) -> bool:
        """Whether a question can follow others: rows are conversations, and the template renders what was before."""
        if FORMATS[self._section.format].kind != "chat":
            return False
        before = {"role": "user", "content": _FIRST}, {"role": "assistant", "content": _ANSWER}
        try:
            text = _text(self._layout.prompt(_SECOND, before))
        except BadRow:
            return False
        return all(part in text for part in (_FIRST, _ANSWER, _SECOND))

    @cached_property
    def learned_to_follow(self) -> bool:
        """Whether, besides, some of the first rows hold several questions (or cannot be looked at here)."""
        source = self._section.source
        if not (self.can_follow and (source.startswith("bundled/") or Path(source).exists())):
            return self.can_follow
        parse = FORMATS[self._section.format].parser(self._section.columns)
        with suppress(DataError):
            for record in read(source, limit=_ROWS):
                with suppress(BadRow):
                    if _questions(parse, record.row) > 1:
                        return True
            return False
        return True

    def _with_bos(self, template: str) -> str:
        """transformers expects a template to write its own bos; ours is put in front by the encoder."""
        return ("{{- bos_token -}}" if self._layout.prompt(_FIRST).bos else "") + template


def encode_prompt(text: str, section: Data, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Token ids that ask a model trained on this `data` section to answer `text`, posed as its rows were.

    Raises:
        DataError: the template cannot be used, or the text holds a NUL character.
    """
    return Prompts(section, tokenizer).encode(text)


def answer_ends(layout: Layout, encoder: Encoder) -> frozenset[int]:
    """eos, and the token that the layout closes an answer with where that is another (ChatML's <|im_end|>)."""
    (row,) = encoder.encode([layout.specimen()])
    return frozenset({encoder.eos_id, int(row.input_ids[row.labels != IGNORE_INDEX][-1])})


def _questions(parse: Callable[[Row], Conversation | Completion], row: Row | BadRow) -> int:
    if isinstance(row, BadRow):
        raise row
    content = parse(row)
    assert isinstance(content, Conversation)
    return sum(message["role"] == "user" for message in content.messages)


def _text(document: Document) -> str:
    return "".join(part.text for part in document.parts)
