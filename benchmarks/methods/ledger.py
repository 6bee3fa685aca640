"""The ledger of finished cells: JSON Lines, one line a cell, appended in one write so that a kill loses one cell."""

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Records = dict[str, dict[str, Any]]
"""records of finished cells by key"""


def read(file: Path) -> Records:
    """Read the finished cells. A torn last line, left by a kill or a full disk, is skipped.

    Raises:
        SystemExit: another line is damaged; nothing is guessed about it.
    """
    if not file.exists():
        return {}
    records: Records = {}
    lines = file.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            record = json.loads(line)
            records[record["key"]] = record
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                continue
            raise SystemExit(
                f"{file}:{number}: not a record of a cell. Delete the line, and its cell runs again"
            ) from None
    return records


def append(file: Path, record: Mapping[str, Any]) -> None:
    """Append one record and wait until it is on the disk; a torn last line is removed first."""
    file.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(record, sort_keys=True) + "\n").encode()
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # two runs can share the ledger; closing unlocks
        _mend(descriptor)
        os.write(descriptor, line)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _mend(descriptor: int) -> None:
    """Cut the file after its last line break."""
    size = os.fstat(descriptor).st_size
    if size and os.pread(descriptor, 1, size - 1) != b"\n":
        content = os.pread(descriptor, size, 0)
        os.ftruncate(descriptor, content.rfind(b"\n") + 1)


def of_base(records: Records, base: str) -> Records:
    """Return the records of cells that adapted the base with this digest; others cannot be compared with them."""
    return {key: record for key, record in records.items() if record["base"] == base}
