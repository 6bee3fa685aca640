"""Encodes new questions as prompts in the layout of a recipe's training rows."""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property

from transformers import PreTrainedTokenizerFast

from qlora.data.chat_template import FIXED_DATE
from qlora.data.encoding import Document
from qlora.data.layout import Layout, template_name
from qlora.data.raw_text import RawText
from qlora.data.sources import on_hub, read
from qlora.data.templates import template_text
from qlora.errors import DataError
from qlora.formats import FORMATS, BadRow, Completion, Conversation, Message, Row
from qlora.formats.values import check_text
from qlora.recipe import Data
from qlora.recipe.source_names import STANDARD_INPUT

NO_SYSTEM = "no system prompt"

KEEP_START = "{{ '' }}"
"""Jinja source between a block and a template: after a block, jinja drops a line break"""

_ROWS = 200
"""rows searched for a conversation with several questions"""

_FIRST, _ANSWER, _SECOND = "first question", "first answer", "second question"


class Prompts:
    """Encodes prompts for a model that was trained on a recipe's `data` section.

        >>> prompts = Prompts(recipe.data, tokenizer)
        >>> ids = prompts.encode("And on Sunday?", before=messages)

    Args:
        system: system message of conversations that have none, usually the one that all training rows share.

    Raises DataError if the template cannot be used.
    """

    def __init__(self, section: Data, tokenizer: PreTrainedTokenizerFast, system: str | None = None) -> None:
        section = section.parts[0]  # several sources: prompts have the layout of the first
        self._layout = Layout(section, tokenizer)
        self._encoder = self._layout.encoder
        self.system = system
        """system message of a conversation that has none; empty for none at all"""
        self._section = section
        self.tokenizer = tokenizer
        name = template_name(section, tokenizer)
        self.template = self._fixed(None if name is None else self._with_bos(template_text(name)))
        """jinja source with which transformers renders the same prompts; None: the tokenizer's own"""
        self.stop_ids = self._layout.answer_ends
        """tokens that end an answer: eos, and the token with which the template closes an answer"""

    @property
    def has_template(self) -> bool:
        """True if the training rows were written with a chat template."""
        return self._layout.has_template

    def encode(self, text: str, before: Sequence[Message] = (), *, system: str | None = None) -> list[int]:
        """Return the token ids of a prompt that asks for an answer to `text`.

        Args:
            text: the new question.
            before: the conversation so far, as messages with `role` and `content`.
            system: system message; None: the one of `before`, else `self.system`. Empty: none, not even `data.system`.

        Raises:
            DataError: The text contains a NUL character, the template refuses the conversation, or `system` is given
                and not written.
        """
        try:
            check_text([text, system, *before], "the prompt")
        except BadRow as error:
            raise DataError(f"{error}; remove it") from None
        asked = system
        if system is None and not (before and before[0]["role"] == "system"):
            system = self.system
        try:
            document = self._layout.prompt(text, before, system)
        except BadRow as error:
            raise DataError(f"the prompt is {error}") from error
        if asked and self._encoder.guard(asked).strip() not in _text(document):
            raise DataError(
                f"format {self._section.format} or its template writes no system message, so the model would not see "
                "it; leave the system message out"
            )
        (encoded,) = self._encoder.encode([document])
        return [int(token) for token in encoded.input_ids]

    def encode_text(self, text: str) -> list[int]:
        """Return the token ids of a plain text to continue, without the template: bos if the tokenizer adds one.

        Control tokens that the text spells are text, unless the recipe's `data.control_tokens` is parse.

        Raises:
            DataError: The text contains a NUL character or a lone surrogate.
        """
        try:
            check_text([text], "the prompt")
        except BadRow as error:
            raise DataError(f"{error}; remove it") from None
        (encoded,) = self._encoder.encode([RawText(self._encoder).prompt(text)])
        return [int(token) for token in encoded.input_ids]

    def describe_system(self, system: str | None = None) -> str:
        """Return one line about the system prompt with which `encode(..., system=system)` asks, for the user."""
        if system is not None:
            return f"system prompt: {_shown(system)}" if system else NO_SYSTEM
        if self.system:
            return f"system prompt: {_shown(self.system)} (that of all training rows)"
        if self.system is None and self._section.system and self._layout.has_template:
            return f"system prompt: {_shown(self._section.system)} (data.system)"
        return NO_SYSTEM

    @cached_property
    def accepts_history(self) -> bool:
        """True if rows are conversations and the template renders earlier messages, so a question can follow others."""
        if FORMATS[self._section.format].kind != "chat":
            return False
        before = {"role": "user", "content": _FIRST}, {"role": "assistant", "content": _ANSWER}
        try:
            text = _text(self._layout.prompt(_SECOND, before))
        except BadRow:
            return False
        return all(part in text for part in (_FIRST, _ANSWER, _SECOND))

    @cached_property
    def trained_on_history(self) -> bool:
        """True if `accepts_history`, and a row near the start has several questions or no row can be read here."""
        source = self._section.source_name
        if not self.accepts_history or on_hub(source) or source in STANDARD_INPUT:
            return self.accepts_history
        parse = FORMATS[self._section.format].parser(self._section.columns)
        with suppress(DataError):
            for record in read(source, limit=_ROWS):
                with suppress(BadRow):
                    if _questions(parse, record.row) > 1:
                        return True
            return False
        return True

    def _fixed(self, template: str | None) -> str | None:
        """Make the date and the options of training the template's own, for programs that do not know them."""
        own = self.tokenizer.chat_template and self.tokenizer.get_chat_template()
        source = template if template is not None else own
        if not source:
            return template
        date = FIXED_DATE if "strftime_now" in source else ""
        options = "".join(
            f"{{% set {name} = {name} if {name} is defined else {json.dumps(value)} %}}"
            for name, value in self._section.template_options.items()
        )
        return date + options + KEEP_START + source if date or options else template

    def _with_bos(self, template: str) -> str:
        """Add bos to a template if the encoder puts it in front: transformers expects the template to write it."""
        return ("{{ bos_token }}" if self._layout.prompt(_FIRST).bos else "") + template


def encode_prompt(text: str, section: Data, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return the token ids of a prompt that asks a model trained on this `data` section to answer `text`.

    Raises:
        DataError: The template cannot be used, or the text contains a NUL character.
    """
    return Prompts(section, tokenizer).encode(text)


def _questions(parse: Callable[[Row], Conversation | Completion], row: Row | BadRow) -> int:
    if isinstance(row, BadRow):
        raise row
    content = parse(row)
    assert isinstance(content, Conversation)
    return sum(message["role"] == "user" for message in content.messages)


def _shown(text: str) -> str:
    """Return a text as one line of at most 200 characters."""
    line = " ".join(text.split())
    return line if len(line) <= 200 else f"{line[:200]} …"


def _text(document: Document) -> str:
    return "".join(part.text for part in document.parts)
