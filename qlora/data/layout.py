"""Reads rows with the recipe's format and writes them with its template."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from qlora.data.encoding import Document, Encoder
from qlora.data.raw_text import RawText
from qlora.data.remarks import (
    MARKERS_IN_TEXT,
    MOVED_SYSTEM,
    OF_ROWS,
    OPENING_ANSWERS,
    PARSED_CONTROLS,
    SPELLED_CONTROLS,
    UNUSED,
    UNWRITTEN_ANSWERS,
    ZERO_WEIGHT,
)
from qlora.data.rendering import Renderer
from qlora.data.templates import OWN, template_text
from qlora.data.transcript import transcript
from qlora.errors import DataError, listed
from qlora.formats import FORMATS, BadRow, Completion, Conversation, Message, Row
from qlora.recipe import Data


class Question(NamedTuple):
    """A prompt, and its answer from the data."""

    document: Document
    text: str
    """the question, without the template around it"""
    reference: str
    before: str = ""
    """the messages before the question, shortened; see `transcript`"""


class Layout:
    """Converts rows to documents as a recipe's `data` section specifies.

    Conversations are written with `data.template`, else with the tokenizer's chat template, else with the default
    template of their format. `Format.kind` decides which rows are written without a template.

    Raises:
        DataError: See `Format.parser`, `template_text` and `Renderer`.
        ModelError: See `Encoder`.
    """

    def __init__(self, section: Data, tokenizer: PreTrainedTokenizerFast) -> None:
        section = section.parts[0]
        self._section = section
        self._parse = FORMATS[section.format].parser(section.columns)
        self._everything = section.train_on == "all"
        parse = section.control_tokens == "parse"
        self.encoder = Encoder(tokenizer, template_of(section, tokenizer) or "", parse_controls=parse)
        """the tokenizer, with the control tokens that the template writes"""
        self._raw = RawText(self.encoder)
        self._renderer = _renderer(section, tokenizer, self.encoder)

    @property
    def has_template(self) -> bool:
        """True if rows are written with a chat template."""
        return self._renderer is not None

    @property
    def missing_markers(self) -> list[str]:
        """Markers such as <|im_start|> that the template writes and the tokenizer does not have."""
        return [] if self._renderer is None else self._renderer.missing_markers

    @property
    def answer_ends(self) -> frozenset[int]:
        """Tokens that end an answer: eos, and the tokens with which the template closes an answer (<|im_end|>)."""
        ends = {self.encoder.eos_id}
        if self._renderer is not None:
            for text in (self._renderer.closing.last, self._renderer.closing.between):
                control = self.encoder.control_at_end(text)
                if control:
                    ends.add(self.encoder.control_id(control[1]))
        return frozenset(ends)

    def read(self, row: Row) -> Conversation | Completion:
        """Parse a row; with a template, convert a prompt and completion to a conversation. Raises BadRow."""
        content = self._parse(row)
        if isinstance(content, Completion):
            if self._renderer is None:
                return content
            question = {"role": "user", "content": content.prompt}
            answer = {"role": "assistant", "content": content.completion}
            content = Conversation((question, answer), unused=content.unused)
        elif self._renderer is None:
            raise BadRow(
                "no chat template", "prompt and completion are messages; set data.template=tokenizer"
            )
        return _with_messages(content, self._with_system(content.messages))

    def documents(self, content: Conversation | Completion) -> list[Document]:
        """Render a row for training, as one or several documents. Raises BadRow if the chat template refuses it."""
        contents = _answer_by_answer(content) if self._section.examples == "answer" else [content]
        documents, refusals = [], []
        for part in contents:
            try:
                documents.append(self._document(part))
            except BadRow as refusal:
                refusals.append(refusal)
        if not documents:
            raise refusals[0]
        documents[0].tallies.update({UNWRITTEN_ANSWERS: len(refusals)} if refusals else {})
        for document in documents[1:]:
            for tally in [name for name in document.tallies if name.partition(": ")[0] in OF_ROWS]:
                del document.tallies[tally]  # counted once a row
        documents[0].tallies.update(f"{UNUSED}: {name}" for name in content.unused)
        if isinstance(content, Conversation):
            context = sum(index < content.trained[-1] for index in content.context)
            documents[0].tallies.update({ZERO_WEIGHT: context} if context else {})
            opening = self._section.examples == "answer" and len(content.trained) > 1 and 0 in content.trained
            documents[0].tallies.update({OPENING_ANSWERS: 1} if opening else {})
        return documents

    def _document(self, content: Conversation | Completion) -> Document:
        if isinstance(content, Completion):
            document = self._raw.document(content, everything=self._everything)
        else:
            assert self._renderer is not None
            moved, messages = self._placed(content.messages, self._section.system_as)
            document = self._rendered(_with_messages(content, messages))
            document = replace(document, system=_system(content.messages))
            document.tallies.update({MOVED_SYSTEM: 1} if moved else {})
        if marker := self.encoder.unknown_marker(_texts(content)):
            document.tallies[f"{MARKERS_IN_TEXT}: {marker}"] += 1
        if spelled := self.encoder.spelled_control(_texts(content)):
            parsed = self._section.control_tokens == "parse"
            document.tallies[f"{PARSED_CONTROLS if parsed else SPELLED_CONTROLS}: {spelled}"] += 1
        return document

    def _rendered(self, content: Conversation) -> Document:
        assert self._renderer is not None
        try:
            return self._renderer.document(content, everything=self._everything)
        except BadRow as refusal:
            moved, messages = self._placed(content.messages, "user")
            if not moved:
                raise
            self._renderer.document(_with_messages(content, messages))  # raises if the reason is another one
            advice = "data.system_as=user puts the system message before the first question"
            raise BadRow(refusal.kind, f"{refusal.detail}; {advice}") from None

    def question(self, content: Conversation | Completion) -> Question:
        """Split a row into the prompt before its last answer, and that answer. A plain text is split near its start."""
        if isinstance(content, Conversation):
            assert self._renderer is not None
            last = content.trained[-1]
            before, answer = content.messages[:last], content.messages[last]
            prompt = self._renderer.prompt(self._placed(before, self._section.system_as)[1], content.tools)
            return Question(prompt, before[-1]["content"], answer["content"], transcript(before[:-1]))
        text, reference = content.prompt, content.completion
        if not text:
            text, reference = _beginning(reference)
        return Question(self._raw.prompt(text), text, reference)

    def prompt(self, text: str, before: Sequence[Message] = (), system: str | None = None) -> Document:
        """Render a user's `text` as a prompt in the layout of the training rows. Without a template, `text` is all.

        Args:
            text: the new question.
            before: earlier messages of the conversation.
            system: system message in place of the one in `before` or in `data.system`; empty: none.

        Raises:
            BadRow: The chat template refuses the conversation.
        """
        if self._renderer is None:
            return self._raw.prompt(text)
        messages: tuple[Message, ...] = (*before, {"role": "user", "content": text})
        if system is None:
            messages = self._with_system(messages)
        else:
            rest = messages[messages[0]["role"] == "system" :]
            messages = ({"role": "system", "content": system}, *rest) if system else rest
        return self._renderer.prompt(self._placed(messages, self._section.system_as)[1])

    def _with_system(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        """Put `data.system` in front of messages without a system message."""
        if self._section.system is None or messages[0]["role"] == "system":
            return tuple(messages)
        return ({"role": "system", "content": self._section.system}, *messages)

    @staticmethod
    def _placed(messages: Sequence[Message], system_as: str) -> tuple[bool, tuple[Message, ...]]:
        """Put the system message before the first question, if `system_as` says so. Return True if it moved."""
        if system_as == "system" or messages[0]["role"] != "system":
            return False, tuple(messages)
        system, *rest = messages
        if not system["content"].strip() or not rest or rest[0]["role"] != "user":
            return False, tuple(messages)
        question = {
            key: f"{system['content']}\n\n{value}" if key in ("content", "instruction") else value
            for key, value in rest[0].items()
        }
        return True, (question, *rest[1:])


def _with_messages(content: Conversation, messages: tuple[Message, ...]) -> Conversation:
    """Replace the messages by others that differ only before the first question."""
    moved = len(messages) - len(content.messages)
    return replace(content, messages=messages, context=frozenset(index + moved for index in content.context))


def _answer_by_answer(content: Conversation | Completion) -> list[Conversation | Completion]:
    """Return one conversation for each trained answer, in which the earlier answers are context."""
    if isinstance(content, Completion):
        return [content]
    answers = [
        index for index in content.trained if index
    ] or content.trained  # the first message follows no prompt
    ends = [*(last + 1 for last in answers[:-1]), len(content.messages)]
    return [
        replace(content, messages=content.messages[:end], context=frozenset(range(last)))
        for last, end in zip(answers, ends, strict=True)
    ]


def _texts(content: Conversation | Completion) -> list[str]:
    if isinstance(content, Completion):
        return [content.prompt, content.completion]
    keys = ("content", "reasoning_content")
    return [message[key] for message in content.messages for key in keys if key in message]


def _system(messages: Sequence[Message]) -> str | None:
    return messages[0]["content"] if messages[0]["role"] == "system" else None


def template_name(section: Data, tokenizer: PreTrainedTokenizerFast) -> str | None:
    """Return the template that replaces the tokenizer's own; None to keep the tokenizer's."""
    section = section.parts[0]
    if section.template is None and not tokenizer.chat_template:
        return FORMATS[section.format].template
    return None if section.template == OWN else section.template


def template_of(section: Data, tokenizer: PreTrainedTokenizerFast) -> str | None:
    """Return the jinja source that rows are written with; None if rows stay raw or no template exists."""
    section = section.parts[0]
    if _stays_raw(section):
        return None
    name = template_name(section, tokenizer)
    return own_template(tokenizer) if name is None else template_text(name)


def own_template(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """Return the jinja source of the tokenizer's own template, None without one.

    Raises:
        DataError: the tokenizer has several templates, and none is the default.
    """
    if not tokenizer.chat_template:
        return None
    try:
        return str(tokenizer.get_chat_template())
    except ValueError:
        names = listed(sorted(tokenizer.chat_template))
        raise DataError(
            f"the tokenizer has several chat templates and no default ({names}); set data.template to a file with the "
            "one to use"
        ) from None


def _renderer(section: Data, tokenizer: PreTrainedTokenizerFast, encoder: Encoder) -> Renderer | None:
    if _stays_raw(section):
        return None
    name = template_name(section, tokenizer)
    template = None if name is None else template_text(name)
    source = template or own_template(tokenizer) or ""
    for option in section.template_options:
        if not re.search(rf"\b{re.escape(option)}\b", source):
            raise DataError(f"data.template_options: the template does not use {option!r}; correct the name")
    return Renderer(tokenizer, encoder, template, section.template_options)


def _stays_raw(section: Data) -> bool:
    kind = FORMATS[section.format].kind
    return kind == "text" or (kind == "pair" and section.template is None)


def _beginning(text: str) -> tuple[str, str]:
    """Split a text at the end of a word, within its first quarter and its first 200 characters."""
    longest = min(200, max(1, len(text) // 4))
    ends = [match.start() for match in re.finditer(r"\s+\S", text[: longest + 1])]
    end = ends[-1] if ends and ends[-1] else longest
    return text[:end], text[end:]
