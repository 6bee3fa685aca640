"""Small JSON files of a model's folder: each holds one object."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora.errors import ModelError


def read_object(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object. Raises ModelError if it cannot be read or holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON: {error}. Restore the file") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: not a JSON object. Restore the file")
    return value


def write_object(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object, indented, in the order of its keys."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
