"""Names the options of a command in messages about the keys of a recipe's `data` section that they set."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from qlora.errors import QloraError

_OPTIONS = {
    "format": "--format",
    "columns": "--column",
    "split": "--split",
    "max_length": "--max-length",
    "on_bad_row": "--on-bad-row",
}
_KEY = re.compile(rf"(?<![\w.-])data\.({'|'.join(_OPTIONS)})\b(?:=(?=\w))?")


def with_options(text: str) -> str:
    """Return a message with each key as the option that sets it.

    Examples:
        >>> with_options("Correct the rows, or skip them with data.on_bad_row=skip")
        'Correct the rows, or skip them with --on-bad-row skip'
    """
    text = text.replace("data.columns to {field: its column}", f"{_OPTIONS['columns']} FIELD=COLUMN")
    return _KEY.sub(lambda key: _OPTIONS[key[1]] + " " * key[0].endswith("="), text)


@contextmanager
def keys_as_options() -> Iterator[None]:
    """Raise a QloraError of the block again, with options in place of keys in its message."""
    try:
        yield
    except QloraError as error:
        text = with_options(str(error))
        raise type(error)(text.removeprefix("--data: ") if text.startswith("--data: --") else text) from error
