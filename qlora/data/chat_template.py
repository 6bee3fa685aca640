"""Runs the jinja source of a chat template, as transformers does.

A template comes with a tokenizer and can loop for ever or build a huge text, so those that are not ours run in a
process with limits (`runtime.bounded`).
"""

import json
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from qlora.data.templates import NAMED, template_text
from qlora.errors import DataError
from qlora.formats import BadRow, Message
from qlora.runtime.bounded import Bounded, OutOfBoundsError

Span = tuple[int, int]
"""start and end of a part of a text, in characters"""

FIXED_DATE = (
    '{%- macro strftime_now(format) -%}{{ "2024-07-26" if format == "%Y-%m-%d" else "26 Jul 2024" }}'
    "{%- endmacro %}"
)
"""Fixed date for templates that write today's date (such as Llama 3.2's), so that a run resumed on another day sees
the same tokens. It is the default date of those templates."""

_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatTemplate:
    """Renders messages with one template.

    Args:
        tokenizer: supplies the special tokens, and its own template if `source` is None.
        source: jinja source.
        options: variables for the template, such as `enable_thinking`.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, source: str | None, options: Mapping[str, Any]
    ) -> None:
        self._tokenizer, self._own_source = tokenizer, source
        self._variables = {**tokenizer.special_tokens_map, **options}
        self._bounded = Bounded(_run, errors=(BadRow, DataError))
        self.content_in_parts = False
        """True passes content as [{"type": "text", "text": ...}], for templates of models that also see"""

    def render(
        self, messages: list[Message], tools: list[Any], *, generation: bool = False
    ) -> tuple[str, list[Span] | None]:
        """Return the rendered text, and the spans of its {% generation %} blocks if the template has any.

        Args:
            messages: the conversation.
            tools: JSON schemas of the functions that the assistant can call.
            generation: add the generation prompt, which starts an answer.

        Raises:
            BadRow: The template refuses the conversation.
            DataError: The template is not valid jinja.
        """
        try:
            return self._render(messages, tools, generation)
        except BadRow:
            if not any(message.get("tool_calls") for message in messages):
                raise
            # Some templates, such as DeepSeek's, expect the arguments as JSON text.
            return self._render([_with_arguments_as_text(message) for message in messages], tools, generation)

    def _render(
        self, messages: list[Message], tools: list[Any], generation: bool
    ) -> tuple[str, list[Span] | None]:
        source = self._source(tools)
        blocks = _GENERATION_BLOCK.search(source) is not None and not generation
        if self.content_in_parts:
            messages = [
                {**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages
            ]
        run = _run if source.removeprefix(FIXED_DATE) in _ours() else self._bounded
        try:
            text, spans = run(source, messages, tools or None, blocks, generation, self._variables)
        except OutOfBoundsError as error:
            raise DataError(
                f"data.template: writing a conversation {error}, which no template needs. Use another one"
            ) from error
        if "\\ufdd" in text:  # the brackets of a guarded spelling, escaped as in JSON
            raise BadRow("refused by the chat template", "it escapes text that spells a control token")
        return text, None if spans is None else [(start, end) for start, end in spans]

    def _source(self, tools: list[Any]) -> str:
        """Return the jinja source; a tokenizer can have another template for conversations with tools."""
        source: str = self._own_source or self._tokenizer.get_chat_template(tools=tools or None)
        return FIXED_DATE + source if "strftime_now" in source else source


def _run(
    source: str,
    messages: list[Message],
    tools: list[Any] | None,
    blocks: bool,
    generation: bool,
    variables: Mapping[str, Any],
) -> tuple[str, list[Span] | None]:
    """Return the text, and the spans of the generation blocks if `blocks`. Raises as `ChatTemplate.render`."""
    try:
        (text,), spans = render_jinja_template(
            [messages],
            tools=tools,
            chat_template=source,
            return_assistant_tokens_mask=blocks,
            add_generation_prompt=generation,
            **variables,
        )
    except jinja2.TemplateSyntaxError as error:
        raise DataError(f"data.template: line {error.lineno} is not valid jinja: {error.message}") from error
    except (
        jinja2.TemplateError,
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise BadRow("refused by the chat template", str(error)) from error
    assert isinstance(text, str)
    return text, list(spans[0]) if blocks else None


@cache
def _ours() -> frozenset[str]:
    """Return the sources of the package's own templates."""
    return frozenset(map(template_text, NAMED))


def _with_arguments_as_text(message: Message) -> Message:
    def as_text(call: Mapping[str, Any]) -> Mapping[str, Any]:
        arguments = call["function"]["arguments"]
        written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return {**call, "function": {**call["function"], "arguments": written}}

    calls = message.get("tool_calls")
    return {**message, "tool_calls": [as_text(call) for call in calls]} if calls else message
