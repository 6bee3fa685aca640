"""Values of a row: text that can be learned, or a BadRow that says what is there instead."""

import textwrap
from typing import Any

from qlora.formats.format import BadRow, Row


def filled(row: Row, name: str, empty: str) -> str:
    """Text that is more than white space; `empty` names the reason if it is not."""
    value = text(row, name)
    if not value.strip():
        raise BadRow(empty, f"{name!r}")
    return value


def present(row: Row, name: str, where: str = "") -> Any:
    """A value that is there and not null. `where` is the place within the row, as `message 2: `."""
    if row.get(name) is None:
        has = textwrap.shorten(", ".join(repr(key) for key in row), 200, placeholder=" ...") or "nothing"
        raise BadRow("missing field", f"{where}{name!r} (the {'message' if where else 'row'} has {has})")
    return row[name]


def text(row: Row, name: str, where: str = "") -> str:
    """Text, perhaps empty, that is valid Unicode without NUL."""
    value = present(row, name, where)
    if not isinstance(value, str):
        raise BadRow("wrong type", f"{where}{name!r} must be text, it is {described(value)}")
    if "\0" in value:
        raise BadRow("NUL character", f"{where}in {name!r}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRow("broken Unicode", f"{where}{name!r} holds half a character (a lone surrogate)") from None
    return value


def described(value: Any) -> str:
    """The type of a value, in JSON's words."""
    kinds = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "an object",
    }
    return "null" if value is None else kinds.get(type(value), type(value).__name__)
