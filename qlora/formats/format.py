"""What a data format is, and what its rows become: a conversation, or a prompt and its completion."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qlora.errors import DataError

Row = Mapping[str, Any]
Message = Mapping[str, str]


class BadRow(ValueError):
    """Why a row cannot be used: a kind that rows share, for totals, and the detail of this one."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages with `role` (system, user, assistant) and `content`, ending with an assistant's.

    A user's message of an Alpaca row also has `instruction` and `input`, for templates that tell them apart.
    """

    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Completion:
    """A text to be learned, after a prompt. The prompt of plain text is empty."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Format:
    """A layout of rows, by the name that `data.format` gives it."""

    name: str
    fields: tuple[str, ...]
    """as the format's own data sets name them"""
    parse: Callable[[Row, Mapping[str, str]], Conversation | Completion]
    """(row, field -> the data's own name of that column) -> content; raises BadRow"""
    kind: Literal["instruction", "chat", "pair", "text"]
    """instruction: one question and its answer, chat: several turns; a chat template writes both.
    pair: a prompt and its completion, raw unless `data.template` is set. text: plain text, always raw."""
    template: str | None = None
    """the named template of rows where neither the recipe nor the tokenizer has one"""

    def parser(self, columns: Mapping[str, str]) -> Callable[[Row], Conversation | Completion]:
        """Return the function that reads a row of this format.

        Args:
            columns: field -> the data's own name of that column, where they differ.

        Raises:
            DataError: `columns` names a field that the format has not. (The function returned raises BadRow.)
        """
        unknown = [field for field in columns if field not in self.fields]
        if unknown:
            raise DataError(
                f"data.columns: the {self.name} format has no field {unknown[0]!r}; "
                f"its fields are {', '.join(self.fields)}, each written as field: column"
            )
        names = {field: columns.get(field, field) for field in self.fields}
        return lambda row: self.parse(row, names)
