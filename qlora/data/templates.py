"""Renders conversations with a chat template and marks the characters to train on.

The trained part of an answer is exactly the text that the model must generate: it starts after the prompt used in
generation (the template rendered up to this turn, with the generation prompt) and ends with the token that closes
the turn. Positions come from rendering prefixes of the conversation, not from searching for token ids.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import jinja2
from transformers import PreTrainedTokenizerFast

from qlora.data.encoding import Document, Encoder, Part
from qlora.data.remarks import UNTRAINED_ANSWERS
from qlora.errors import DataError
from qlora.formats import BadRow, Completion, Conversation, Message

_FOLDER = files("qlora.data") / "chat_templates"

NAMED = tuple(sorted(file.name.removesuffix(".jinja") for file in _FOLDER.iterdir()))
"""Templates that ship with qlora: the names of the files in chat_templates/."""

_PROBE = "qlora's probe"

_FIXED_DATE = (
    '{%- macro strftime_now(format) -%}{{ "2024-07-26" if format == "%Y-%m-%d" else "26 Jul 2024" }}'
    "{%- endmacro %}"
)
"""Fixed date for templates that write today's date (such as Llama 3.2's), so that a run resumed on another day sees
the same tokens. It is the default date of those templates."""


def template_text(name: str) -> str:
    """Return the jinja source of a named template or of a .jinja file.

    Raises:
        DataError: No template has this name, or the file cannot be read.
    """
    if name in NAMED:
        return (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    path = Path(name).expanduser()
    if path.suffix not in (".jinja", ".jinja2", ".j2"):
        raise DataError(
            f"data.template: {name!r} is not a template; set it to {', '.join(NAMED)} or the path of a .jinja file"
        )
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DataError(f"data.template: {name!r} cannot be read: {reason}") from error


@dataclass(frozen=True, slots=True)
class _Closing:
    """The text with which a template ends an answer."""

    text: str
    """text after each answer"""
    by_control: bool
    """True if `text` ends with a control token"""
    ends_by_control: bool
    """True if a control token follows the last answer; otherwise eos is appended"""


class Renderer:
    """Renders conversations with one template.

    Args:
        tokenizer: supplies bos_token and eos_token, and its own template if `template` is None.
        encoder: encoder of the same tokenizer.
        template: jinja source; None uses the tokenizer's own template. The tokenizer's own template must write
            bos itself if it needs one (transformers' convention). With another template, bos is put in front of
            a text without bos if the tokenizer does so with plain text.

    Raises:
        DataError: There is no template, or it cannot render a question and an answer.
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
        """Render the conversation up to the end of its last answer, with the answers marked as trained.

        An answer is not trained if the template renders the messages before it differently on their own than
        within the whole conversation. (Mistral's template, for example, moves the system message to the last
        question.) Such an answer does not continue a prompt used in generation, and is counted in the tallies.

        Args:
            conversation: messages that end with an answer.
            everything: train all of the text, not only the answers.

        Raises:
            BadRow: The template refuses the conversation.
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
            tallies=+Counter({UNTRAINED_ANSWERS: len(answers) - len(spans)}),
        )

    def prompt(self, messages: Sequence[Message]) -> Document:
        """Render the generation prompt for an answer to these messages. Raises BadRow if the template refuses them."""
        text = self._render(self._guarded(messages), generation=True)
        return Document((Part(text, False),), bos=self._needs_bos(text), eos=False)

    def _answer(self, whole: str, messages: list[Message], index: int) -> tuple[int, int] | None:
        """Return start and end of answer `index` with its closing; None if it does not continue its prompt."""
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
        position = whole.find(answer, start)
        if position < 0:
            return None
        end = position + len(answer)
        return end + len(closing.text) if whole.startswith(closing.text, end) else end

    def _find_closing(self) -> _Closing:
        """Render two short conversations to learn which text the template writes after an answer."""
        question, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}
        try:
            tail = self._after_probe([question, answer])
        except BadRow as error:
            raise DataError(
                f"data.template cannot render a question and its answer: {error}. Correct it"
            ) from None
        try:
            # Cut before the next question: the text after it does not belong to the answer.
            two = [question, answer, question, {**answer, "content": "!"}]
            between = self._after_probe(two).partition("?")[0]
        except BadRow:
            between = tail  # the template allows one question only
        shared = _common_start(tail, between)
        control = self._encoder.find_control(shared)
        if control:
            text = shared[: control.end()]
        elif shared == tail:
            text = tail.rstrip()
        else:
            text = re.sub(r"\s+\S*$", "", shared)  # drop a word whose first letters match by chance
        return _Closing(text, control is not None, self._encoder.find_control(tail) is not None)

    def _after_probe(self, messages: Sequence[Message]) -> str:
        rendered = self._render(messages)
        _, probe, tail = rendered.rpartition(_PROBE)
        if not probe:
            raise DataError(
                f"data.template does not render the answer; its output is {rendered!r}. "
                "Add the content of assistant messages to it"
            )
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
            raise DataError(
                f"data.template: line {error.lineno} is not valid jinja: {error.message}"
            ) from error
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
    """Renders a prompt and completion without a template: bos in front if the tokenizer adds one, eos at the end."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def document(self, row: Completion, *, everything: bool = False) -> Document:
        """Render a row with its completion trained; with `everything`, the prompt too."""
        guard = self._encoder.guard
        parts = (Part(guard(row.prompt), everything), Part(guard(row.completion), True))
        return Document(tuple(part for part in parts if part.text), bos=self._encoder.adds_bos, eos=True)

    def prompt(self, text: str) -> Document:
        """Render a text for the model to continue."""
        return Document((Part(self._encoder.guard(text), False),), bos=self._encoder.adds_bos, eos=False)
