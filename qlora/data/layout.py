"""Reads rows with the recipe's format and writes them with its template."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from qlora.data.encoding import Document, Encoder
from qlora.data.remarks import SPELLED_CONTROLS
from qlora.data.templates import RawText, Renderer, template_text
from qlora.formats import FORMATS, Completion, Conversation, Message, Row
from qlora.recipe import Data


class Question(NamedTuple):
    """A prompt, and its answer from the data."""

    document: Document
    text: str
    """the question, without the template around it"""
    reference: str


class Layout:
    """Converts rows to documents as a recipe's `data` section specifies.

    Conversations are written with `data.template`, else with the tokenizer's chat template, else with the default
    template of their format. `Format.kind` decides which rows are written without a template.

    Raises:
        DataError: See `Format.parser`, `template_text` and `Renderer`.
    """

    def __init__(self, section: Data, tokenizer: PreTrainedTokenizerFast, encoder: Encoder) -> None:
        section = section.parts[0]
        self._parse = FORMATS[section.format].parser(section.columns)
        self._everything = section.train_on == "all"
        self._raw = RawText(encoder)
        self._renderer = _renderer(section, tokenizer, encoder)

    def read(self, row: Row) -> Conversation | Completion:
        """Parse a row; with a template, convert a prompt and completion to a conversation. Raises BadRow."""
        content = self._parse(row)
        if self._renderer and isinstance(content, Completion):
            question = {"role": "user", "content": content.prompt}
            return Conversation((question, {"role": "assistant", "content": content.completion}))
        return content

    def documents(self, content: Conversation | Completion) -> list[Document]:
        """Render a row for training, as one or several documents. Raises BadRow if the chat template refuses it."""
        document = self._document(content)
        if document.spells_control:
            document.tallies[SPELLED_CONTROLS] += 1
        return [document]

    def _document(self, content: Conversation | Completion) -> Document:
        if isinstance(content, Completion):
            return self._raw.document(content, everything=self._everything)
        assert self._renderer is not None
        return self._renderer.document(content, everything=self._everything)

    def question(self, content: Conversation | Completion) -> Question:
        """Split a row into the prompt before its last answer, and that answer. A plain text is split near its start."""
        if isinstance(content, Conversation):
            assert self._renderer is not None
            *before, answer = content.messages
            return Question(self._renderer.prompt(before), before[-1]["content"], answer["content"])
        prompt, reference = content.prompt, content.completion
        if not prompt:
            prompt, reference = _beginning(reference)
        return Question(self._raw.prompt(prompt), prompt, reference)

    def prompt(self, text: str, before: Sequence[Message] = ()) -> Document:
        """Render a user's `text` as a prompt in the layout of the training rows.

        Args:
            text: the new question.
            before: earlier messages of the conversation; ignored without a template.

        Raises:
            BadRow: The chat template refuses the conversation.
        """
        if self._renderer is None:
            return self._raw.prompt(text)
        return self._renderer.prompt([*before, {"role": "user", "content": text}])

    def shortest_row(self) -> Document:
        """Render the shortest possible row."""
        if self._renderer is None:
            return self._document(Completion("?", "!"))
        question, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}
        return self._document(Conversation((question, answer)))


def template_name(section: Data, tokenizer: PreTrainedTokenizerFast) -> str | None:
    """Return the template that replaces the tokenizer's own; None to keep the tokenizer's."""
    section = section.parts[0]
    if section.template is None and not tokenizer.chat_template:
        return FORMATS[section.format].template
    return section.template


def template_of(section: Data, tokenizer: PreTrainedTokenizerFast) -> str | None:
    """Return the jinja source that rows are written with; None if rows stay raw or no template exists."""
    section = section.parts[0]
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
    """Split a text at the end of a word, within its first quarter and its first 200 characters."""
    longest = min(200, max(1, len(text) // 4))
    ends = [match.start() for match in re.finditer(r"\s+\S", text[: longest + 1])]
    end = ends[-1] if ends and ends[-1] else longest
    return text[:end], text[end:]
