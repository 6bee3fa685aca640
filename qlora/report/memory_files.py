"""Memory reports: memory.json for programs, memory.md and memory.png for people, a table for the terminal."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora.recipe.sizes import Unit
from qlora.report.memory_comparison import COLUMNS, Comparison, Row
from qlora.storage import atomic

if TYPE_CHECKING:
    from rich.table import Table


def write(folder: Path, memory: Mapping[str, Any]) -> None:
    """Write memory.json, memory.md and memory.png into a run's folder, each whole or not at all.

    Raises:
        SaveError: one of them cannot be written.
    """
    from qlora.report import memory_picture

    atomic.write(folder / "memory.json", (json.dumps(memory) + "\n").encode())
    atomic.write(folder / "memory.md", markdown(memory).encode())
    atomic.write(folder / "memory.png", memory_picture.png(memory))


def markdown(memory: Mapping[str, Any]) -> str:
    """memory.md: the parts in four columns, the phases, and what the documents' estimates are worth."""
    comparison = Comparison(memory)
    unit = comparison.unit
    total = [f"**{cell}**" for cell in ["total", *comparison.total.cells(unit)]]
    if comparison.measured is None:
        total[-1] = "not measured"
    parts = [[row.label, *_cells(row, unit)] for row in comparison.rows]
    phases = [[row.label, *_cells(row, unit)] for row in comparison.phases]
    beside = [[row.label, *_cells(row, unit)] for row in comparison.beside]
    sections = [
        "# Memory",
        f"{comparison.finding}.",
        f"{comparison.fit}. {comparison.workload[0].upper()}{comparison.workload[1:]}.",
        _table([unit.name, *COLUMNS, "error"], [*parts, [*total, comparison.total.error]]),
        "## Phases of a step",
        _table([f"highest total, {unit.name}", *COLUMNS[2:], "error"], phases),
        "## Beside the parts" if beside else "",
        _table([unit.name, *COLUMNS[2:], "error"], beside) if beside else "",
        "## What the documents' estimates are worth here",
        "\n".join(f"- {remark}" for remark in memory["documents"]["remarks"]),
        "![Bars of the estimates, the forecast and the measurement; a step, part by part](memory.png)",
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def table(memory: Mapping[str, Any]) -> "Table":
    """The parts for a terminal, at most 100 columns wide; empty parts and columns are left out.

    >>> Console().print(table(memory))
    """
    from rich import box
    from rich.table import Table

    comparison = Comparison(memory)
    unit, names = comparison.unit, [*COLUMNS, "error"] if comparison.measured else COLUMNS[:-1]
    shown = Table(
        box=box.SIMPLE_HEAD, show_edge=False, padding=0, title=comparison.finding, title_justify="left",
        title_style="bold",
    )  # fmt: skip
    shown.add_column(unit.name, overflow="fold")  # the labels wrap where there is no room, the numbers never
    for name in names:
        shown.add_column(name.replace(": ", "\n"), justify="right", no_wrap=True)
    for row in comparison.rows:
        shown.add_row(row.label, *_cells(row, unit)[: len(names)])
    shown.add_section()
    shown.add_row("total", *_cells(comparison.total, unit)[: len(names)], style="bold")
    return shown


def _cells(row: Row, unit: Unit) -> list[str]:
    """Sizes and error."""
    return [*row.cells(unit), row.error]


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table: labels to the left, numbers to the right."""
    header = list(header)
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
