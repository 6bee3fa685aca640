"""Keeps the rows that are piped into a command in a temporary file, because they are read more than once."""

import shutil
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from qlora.errors import DataError
from qlora.runtime.launch import process_count


@cache
def spooled() -> Path:
    """Copy the standard input to a temporary file, once a process, and return its path. The file ends with the process.

    Raises:
        DataError: Nothing is piped into the command, or several processes run it.
        UsageError: a variable of a launcher is wrong.
    """
    if process_count() > 1:
        raise DataError(
            "data.source: several processes cannot share the standard input; write the rows to a file and give its path"
        )
    if sys.stdin is None or sys.stdin.isatty():  # None: a process without standard streams imports qlora
        raise DataError(
            "data.source: reads the standard input, and nothing is piped into the command; write "
            "`... | qlora COMMAND data.source=-`"
        )
    copy = _temporary_file()
    shutil.copyfileobj(sys.stdin.buffer, copy)
    copy.flush()
    return Path(copy.name)


@cache
def _temporary_file() -> Any:
    # the file is removed with its object, which this cache keeps
    return tempfile.NamedTemporaryFile(prefix="qlora-rows-")
