"""Conversations -> documents: the tokenizer's chat template or another, and which characters are learned.

What is learned of a turn is what the model has to write when it answers: everything after the prompt as
generation would pose it (the template rendered up to the turn, with the generation prompt), through to the
token that closes the turn. Positions come from rendering prefixes, not from searching for ids.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import jinja2
from transformers import PreTrainedTokenizerFast

from qlora.data.encoding import Document, Encoder, Part
from qlora.errors import DataError
from qlora.formats import BadRow, Completion, Conversation, Message

NAMED = ("alpaca", "chatml", "plain")
"""The templates that ship with qlora."""

_PROBE = "qlora's probe"

_FIXED_DATE = (
    '{%- macro strftime_now(format) -%}{{ "2024-07-26" if format == "%Y-%m-%d" else "26 Jul 2024" }}'
    "{%- endmacro %}"
)
"""Some templates (Llama 3.2's) write today's date. A run that is resumed tomorrow must see the same tokens;
this date is what the same templates fall back on."""


def template_text(name: str) -> str:
    """The jinja source of a named template or of a .jinja file.

    Raises:
        DataError: there is none of that name.
    """
    if name in NAMED:
        return (files("qlora.data") / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    path = Path(name).expanduser()
    if path.suffix not in (".jinja", ".jinja2", ".j2"):
        raise DataError(
            f"data.template: {name!r} is neither a named template ({', '.join(NAMED)}) nor a .jinja file"
        )
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DataError(f"data.template: {name!r} cannot be read: {reason}") from error


@dataclass(frozen=True, slots=True)
class _Closing:
    """How a template ends an answer."""

    text: str
    """what it writes after each answer"""
    by_control: bool
    """`text` ends with a control token"""
    ends_by_control: bool
    """a control token follows the last answer; if none does, eos is put there"""


class Renderer:
    """Renders conversations with one template.

    Args:
        tokenizer: fills in bos_token and eos_token, and perhaps has a template of its own.
        encoder: of the same tokenizer.
        template: jinja source; None is the tokenizer's own. The tokenizer's own decides itself whether there
            is a bos (transformers' convention); with another, one is put in front of a text that has none,
            if the tokenizer does so with plain text.

    Raises:
        DataError: there is no template, or it cannot render a question and an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, encoder: Encoder, template: str | None) -> None:
        if template is None and not tokenizer.chat_template:
            raise DataError(
                "the tokenizer has no chat template: set data.template to one of "
                f"{', '.join(NAMED)} or to a .jinja file"
            )
        source = tokenizer.get_chat_template() if template is None else template
        self._source = _FIXED_DATE + source if "strftime_now" in source else source
        self._tokenizer = tokenizer
        self._encoder = encoder
        self._adds_bos = template is not None and encoder.adds_bos
        self._closing = self._find_closing()

    def document(self, conversation: Conversation, *, everything: bool = False) -> Document:
        """The conversation to the end of its last answer; answers are trained, with `everything` all of it.

        An answer is not trained where the template renders the conversation before it in another way than
        within the whole (Mistral's, for one, moves the system message to the last question): it is then no
        continuation of a prompt that generation would ever pose. The document counts such answers.

        Raises:
            BadRow: the template refuses the conversation.
        """
        messages = self._guarded(conversation.messages)
        whole = self._render(messages)
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        spans = {index: span for index in answers if (span := self._answer(whole, messages, index))}
        parts: list[Part] = []
        end = 0
        for start, stop in spans.values():
            parts += [Part(whole[end:start], everything), Part(whole[start:stop], True)]
            end = stop
        return Document(
            tuple(part for part in parts if part.text),
            bos=self._needs_bos(whole),
            eos=answers[-1] in spans and not self._closing.ends_by_control,
            untrained_answers=len(answers) - len(spans),
        )

    def prompt(self, messages: Sequence[Message]) -> Document:
        """What generation poses to have these messages answered. Raises BadRow if the template refuses."""
        text = self._render(self._guarded(messages), generation=True)
        return Document((Part(text, False),), bos=self._needs_bos(text), eos=False)

    def _answer(self, whole: str, messages: list[Message], index: int) -> tuple[int, int] | None:
        """Where answer `index` with its closing begins and ends; None if it does not continue its prompt."""
        for generation in (True, False):
            prompt = self._render(messages[:index], generation=generation)
            if whole.startswith(prompt):
                end = self._answer_end(whole, len(prompt), messages, index)
                return None if end is None else (len(prompt), end)
        return None

    def _answer_end(self, whole: str, start: int, messages: list[Message], index: int) -> int | None:
        closing = self._closing
        if index == len(messages) - 1:
            last_control = self._encoder.last_control_end(whole, start)
            return last_control if closing.ends_by_control else len(whole.rstrip())
        if closing.by_control:
            # The user's text is guarded, so the next control token is the template's.
            control = self._encoder.find_control(whole, start)
            return control.end() if control else None
        answer = messages[index]["content"].strip()
        found = whole.find(answer, start)
        if found < 0:
            return None
        end = found + len(answer)
        return end + len(closing.text) if whole.startswith(closing.text, end) else end

    def _find_closing(self) -> _Closing:
        """Learns from two short exchanges what the template writes after an answer."""
        question, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}
        try:
            tail = self._after_probe([question, answer])
        except BadRow as error:
            raise DataError(f"data.template cannot render a question and its answer: {error}") from None
        try:
            # Cut before the next question: what comes after it tells nothing about the answer.
            two = [question, answer, question, {**answer, "content": "!"}]
            between = self._after_probe(two).partition("?")[0]
        except BadRow:
            between = tail  # a template for single questions
        shared = _common_start(tail, between)
        control = self._encoder.find_control(shared)
        if control:
            text = shared[: control.end()]
        elif shared == tail:
            text = tail.rstrip()
        else:
            text = re.sub(r"\s+\S*$", "", shared)  # a word that both begin alike by chance closes nothing
        return _Closing(text, control is not None, self._encoder.find_control(tail) is not None)

    def _after_probe(self, messages: Sequence[Message]) -> str:
        rendered = self._render(messages)
        _, found, tail = rendered.rpartition(_PROBE)
        if not found:
            raise DataError(f"data.template leaves the answer out; it renders {rendered!r}")
        return tail

    def _needs_bos(self, text: str) -> bool:
        return self._adds_bos and not self._encoder.starts_with_bos(text)

    def _guarded(self, messages: Sequence[Message]) -> list[Message]:
        guard = self._encoder.guard
        return [{key: guard(value) for key, value in message.items()} for message in messages]

    def _render(self, messages: Sequence[Message], *, generation: bool = False) -> str:
        try:
            rendered = self._tokenizer.apply_chat_template(
                messages, chat_template=self._source, tokenize=False, add_generation_prompt=generation
            )
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"data.template: line {error.lineno} is no jinja: {error.message}") from error
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
        ) as error:
            raise BadRow("refused by the chat template", str(error)) from error
        assert isinstance(rendered, str)
        return rendered


def _common_start(a: str, b: str) -> str:
    return a[: next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))]


class RawText:
    """Prompt and completion as they are; bos in front if the tokenizer puts one there, eos behind."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def document(self, row: Completion, *, everything: bool = False) -> Document:
        """The completion trained, or with `everything` the prompt too."""
        guard = self._encoder.guard
        parts = (Part(guard(row.prompt), everything), Part(guard(row.completion), True))
        return Document(tuple(part for part in parts if part.text), bos=self._encoder.adds_bos, eos=True)

    def prompt(self, text: str) -> Document:
        """A text to be continued."""
        return Document((Part(self._encoder.guard(text), False),), bos=self._encoder.adds_bos, eos=False)
