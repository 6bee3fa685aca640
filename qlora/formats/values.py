"""Reads values of a row; raises BadRow with the reason if a value cannot be used."""

import textwrap
from collections.abc import Mapping
from typing import Any

from qlora.formats.format import BadRow, Row


def filled(row: Row, name: str, empty: str) -> str:
    """Return text that is not blank; raise BadRow of the kind `empty` if it is blank."""
    value = text(row, name)
    if not value.strip():
        raise BadRow(empty, f"{name!r}")
    return value


def present(row: Row, name: str, where: str = "") -> Any:
    """Return a value that is not missing or null. `where` is the place within the row, such as `message 2: `."""
    if name in row and row[name] is None:
        raise BadRow("missing field", f"{where}{name!r} is null")
    if name not in row:
        has = textwrap.shorten(", ".join(repr(key) for key in row), 200, placeholder=" ...") or "nothing"
        raise BadRow("missing field", f"{where}{name!r} (the {'message' if where else 'row'} has {has})")
    return row[name]


def text(row: Row, name: str, where: str = "") -> str:
    """Return text, possibly empty, that is valid Unicode without NUL."""
    value = present(row, name, where)
    if not isinstance(value, str):
        raise BadRow("wrong type", f"{where}{name!r} must be text, not {described(value)}")
    check_text(value, f"{where}{name!r}")
    return value


def check_text(value: Any, place: str) -> None:
    """Check all text in a value, at any depth. Raises BadRow for a NUL, for invalid Unicode, and for a key that is no
    text."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise BadRow("wrong type", f"{place}: the key {key!r} must be text")
            check_text(key, place)
            check_text(inner, place)
    elif isinstance(value, list | tuple):
        for inner in value:
            check_text(inner, place)
    elif isinstance(value, str):
        if "\0" in value:
            raise BadRow("NUL character", f"in {place}")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise BadRow("broken Unicode", f"{place} contains half a character (a lone surrogate)") from None


def described(value: Any) -> str:
    """Name the JSON type of a value."""
    kinds = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "an object",
    }
    return "null" if value is None else kinds.get(type(value), type(value).__name__)
