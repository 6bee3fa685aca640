"""How a recipe lays its rows out: which format they are read as and which template they are written with."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from qlora.data.encoding import Document, Encoder
from qlora.data.templates import RawText, Renderer, template_text
from qlora.formats import FORMATS, Completion, Conversation, Message, Row
from qlora.recipe import Data


class Question(NamedTuple):
    """A prompt to answer and the answer that the data has."""

    document: Document
    text: str
    """what a person asked, without the template around it"""
    reference: str


class Layout:
    """Row -> document, as a recipe's `data` section says.

    Conversations are written with `data.template`, or else with the tokenizer's chat template, or else with the
    template that their format names. Which rows stay raw is said at `Format.kind`.

    Raises:
        DataError: see `Format.parser`, `template_text` and `Renderer`.
    """

    def __init__(self, section: Data, tokenizer: PreTrainedTokenizerFast, encoder: Encoder) -> None:
        self._parse = FORMATS[section.format].parser(section.columns)
        self._everything = section.train_on == "all"
        self._raw = RawText(encoder)
        self._renderer = _renderer(section, tokenizer, encoder)

    def read(self, row: Row) -> Conversation | Completion:
        """The row's content, in the shape that this layout writes. Raises BadRow."""
        content = self._parse(row)
        if self._renderer and isinstance(content, Completion):
            question = {"role": "user", "content": content.prompt}
            return Conversation((question, {"role": "assistant", "content": content.completion}))
        return content

    def document(self, content: Conversation | Completion) -> Document:
        """The whole row, as it is trained on. Raises BadRow if the chat template refuses it."""
        if isinstance(content, Completion):
            return self._raw.document(content, everything=self._everything)
        assert self._renderer is not None
        return self._renderer.document(content, everything=self._everything)

    def question(self, content: Conversation | Completion) -> Question:
        """The row up to its last answer, and that answer. Of a plain text, its beginning and the rest."""
        if isinstance(content, Conversation):
            assert self._renderer is not None
            *before, answer = content.messages
            return Question(self._renderer.prompt(before), before[-1]["content"], answer["content"])
        prompt, reference = content.prompt, content.completion
        if not prompt:
            prompt, reference = _beginning(reference)
        return Question(self._raw.prompt(prompt), prompt, reference)

    def prompt(self, text: str, before: Sequence[Message] = ()) -> Document:
        """What somebody types, posed as the rows of the data are posed, after the messages `before` it.

        Raises BadRow if the chat template refuses the conversation. Raw text knows no `before`.
        """
        if self._renderer is None:
            return self._raw.prompt(text)
        return self._renderer.prompt([*before, {"role": "user", "content": text}])

    def specimen(self) -> Document:
        """The shortest row there could be."""
        if self._renderer is None:
            return self.document(Completion("?", "!"))
        question, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}
        return self.document(Conversation((question, answer)))


def template_name(section: Data, tokenizer: PreTrainedTokenizerFast) -> str | None:
    """The template that takes the place of the tokenizer's own; None where that stays."""
    if section.template is None and not tokenizer.chat_template:
        return FORMATS[section.format].template
    return section.template


def template_of(section: Data, tokenizer: PreTrainedTokenizerFast) -> str | None:
    """The jinja source that rows are written with; None where they stay raw or nothing has a template."""
    if _stays_raw(section):
        return None
    name = template_name(section, tokenizer)
    return tokenizer.chat_template and tokenizer.get_chat_template() if name is None else template_text(name)


def _renderer(section: Data, tokenizer: PreTrainedTokenizerFast, encoder: Encoder) -> Renderer | None:
    if _stays_raw(section):
        return None
    name = template_name(section, tokenizer)
    return Renderer(tokenizer, encoder, None if name is None else template_text(name))


def _stays_raw(section: Data) -> bool:
    kind = FORMATS[section.format].kind
    return kind == "text" or (kind == "pair" and section.template is None)


def _beginning(text: str) -> tuple[str, str]:
    """A text cut in two where a word ends, after its first quarter but at most 200 characters."""
    longest = min(200, max(1, len(text) // 4))
    ends = [match.start() for match in re.finditer(r"\s+\S", text[: longest + 1])]
    end = ends[-1] if ends and ends[-1] else longest
    return text[:end], text[end:]
