"""The record of the sweep: a JSON line a model, the last one of a model counts."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.methods import machine

FILE = Path(__file__).parents[1] / "reports/architectures.jsonl"


def read(file: Path = FILE) -> dict[str, dict[str, Any]]:
    """Return the newest line of each model, in alphabetical order; a line that a kill cut is left out."""
    lines: dict[str, dict[str, Any]] = {}
    for text in file.read_text().splitlines() if file.exists() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        lines[line["model"]] = line
    return dict(sorted(lines.items()))


def add(file: Path, line: dict[str, Any]) -> None:
    """Append the line of a model, in place of an older one."""
    kept = [one for name, one in read(file).items() if name != line["model"]]
    text = "".join(json.dumps(one) + "\n" for one in sorted([*kept, line], key=lambda one: one["model"]))
    file.write_text(text)


@cache
def where() -> dict[str, Any]:
    """Return machine, versions, commit and date."""
    found = machine.where(1)
    versions = {name: found["versions"][name] for name in ("torch", "transformers", "bitsandbytes")}
    return {
        "machine": found["machine"],
        "versions": versions,
        "commit": found["commit"],
        "date": found["date"],
    }
