"""Data formats, and the contents of a row: a conversation, or a prompt and its completion."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qlora.errors import DataError

Row = Mapping[str, Any]
Message = Mapping[str, str]


class BadRow(ValueError):
    """A row cannot be used.

    Args:
        kind: short name of the problem, by which rows are counted.
        detail: what is wrong with this row.
    """

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages with `role` (system, user or assistant) and `content`; the last one is the assistant's.

    The user message of an Alpaca row also has `instruction` and `input`, for templates that use them separately.
    """

    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Completion:
    """A text to learn, after a prompt. For plain text, the prompt is empty."""

    prompt: str
    completion: str


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
        return lambda row: self.parse(row, names)
