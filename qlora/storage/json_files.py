"""Small JSON files of a model's folder: each holds one object."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora.errors import ModelError
from qlora.storage import regular_file

CHECKSUM = "sha256"
"""key of an object's own checksum"""


def with_checksum(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON object with a checksum of itself, so that a changed value is noticed."""
    read_again = json.loads(json.dumps(content))  # numbers as keys become text, and sort differently
    return {**content, CHECKSUM: _checksum(read_again)}


def without_checksum(content: Any) -> dict[str, Any]:
    """Return the object that `with_checksum` was given; an object of an earlier version, which has none, as it is.

    Raises:
        ValueError: the content is no object, or has changed.
    """
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    rest = {key: value for key, value in content.items() if key != CHECKSUM}
    if CHECKSUM in content and content[CHECKSUM] != _checksum(rest):
        raise ValueError("its checksum differs")
    return rest


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_object(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object. Raises ModelError if it cannot be read or holds something else."""
    try:
        value = json.loads(regular_file.read_text(path))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON: {error}. Restore the file") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: not a JSON object. Restore the file")
    return value


def write_object(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object, indented, in the order of its keys."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
