"""Data formats, and the contents of a row: a conversation, or a prompt and its completion."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from qlora.errors import DataError

Row = Mapping[str, Any]
Message = Mapping[str, Any]


class BadRow(ValueError):
    """A row cannot be used.

    Args:
        kind: short name of the problem, by which rows are counted.
        detail: what is wrong with this row.
    """

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind, self.detail = kind, detail

    def __reduce__(self) -> tuple[Any, ...]:
        """Return what makes the same error in another process."""
        return type(self), (self.kind, self.detail)


class NotTrained(BadRow):
    """A row says itself that it must not be trained, as `label: false` does. It is left out and counted."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages with `role` (system, user, assistant or tool) and `content`; at least one answer is trained.

    A message can also have `reasoning_content`, `tool_calls`, `tool_call_id` and `name`, as transformers passes them
    to chat templates. The user message of an Alpaca row has `instruction` and `input`, for templates that use them
    separately.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    """JSON schemas of the functions that the assistant can call"""
    context: frozenset[int] = frozenset()
    """indices of answers that are context only, because the row gives them no weight"""
    unused: tuple[str, ...] = ()
    """columns and message keys with content that nothing reads"""

    @property
    def trained(self) -> list[int]:
        """Indices of the answers to train."""
        return [
            index
            for index, message in enumerate(self.messages)
            if message["role"] == "assistant" and index not in self.context
        ]


@dataclass(frozen=True, slots=True)
class Completion:
    """A text to learn, after a prompt. For plain text, the prompt is empty."""

    prompt: str
    completion: str
    unused: tuple[str, ...] = ()
    """columns with content that nothing reads"""


@dataclass(frozen=True, slots=True)
class Format:
    """A layout of rows and its parser."""

    name: str
    """value of `data.format`"""
    fields: tuple[str, ...]
    """default column names"""
    parse: Callable[[Row, Mapping[str, str]], Conversation | Completion]
    """(row, field -> column) -> content; raises BadRow"""
    kind: Literal["instruction", "chat", "pair", "text"]
    """instruction: one question and its answer; chat: several turns; both are rendered by a chat template.
    pair: a prompt and its completion, raw unless `data.template` is set. text: plain text, always raw."""
    template: str | None = None
    """template to use if neither the recipe nor the tokenizer has one"""
    optional: tuple[str, ...] = ()
    """further columns that the parser reads if a row has them; they keep their names"""

    def parser(self, columns: Mapping[str, str]) -> Callable[[Row], Conversation | Completion]:
        """Return a function that parses a row of this format and raises BadRow if it cannot.

        Args:
            columns: field -> column, for columns that are not named after their field.

        Raises:
            DataError: `columns` names a field that the format does not have.
        """
        unknown = [field for field in columns if field not in self.fields]
        if unknown:
            raise DataError(
                f"data.columns: the {self.name} format has no field {unknown[0]!r}; "
                f"its fields are {', '.join(self.fields)}, each written as field: column"
            )
        names = {field: columns.get(field, field) for field in self.fields}
        used = {*names.values(), *self.optional}

        def parse(row: Row) -> Conversation | Completion:
            content = self.parse(row, names)
            unused = [f"column {key}" for key in row if key not in used and not is_empty(row[key])]
            return replace(content, unused=(*content.unused, *unused)) if unused else content

        return parse


def is_empty(value: Any) -> bool:
    """Return True for null, blank text and an empty list or object."""
    return value is None or value == [] or value == {} or (isinstance(value, str) and not value.strip())
