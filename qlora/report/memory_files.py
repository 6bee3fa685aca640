"""Memory reports: memory.json for programs, memory.md and memory.png for people, a table for the terminal."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora.recipe.sizes import Unit
from qlora.report.memory_comparison import COLUMNS, RULE_OF_THUMB, RULE_OF_THUMB_IN_SHORT, Comparison, Row
from qlora.storage import atomic

if TYPE_CHECKING:
    from rich.console import Group


def write(folder: Path, memory: Mapping[str, Any]) -> None:
    """Write memory.json, memory.md and memory.png into a run's folder. A crash leaves no half-written file.

    Args:
        folder: the run's folder.
        memory: content of memory.json.

    Raises:
        SaveError: a file cannot be written.
    """
    from qlora.report import memory_picture

    atomic.write(folder / "memory.json", (json.dumps(memory) + "\n").encode())
    atomic.write(folder / "memory.md", markdown(memory).encode())
    atomic.write(folder / "memory.png", memory_picture.png(memory))


def markdown(memory: Mapping[str, Any]) -> str:
    """Return memory.md: the parts in four columns, the phases, and remarks on the rule of thumb."""
    comparison = Comparison(memory)
    unit = comparison.unit
    total = [f"**{cell}**" for cell in ["total", *comparison.total.cells(unit)]]
    if comparison.measured is None:
        total[-1] = "not measured"
    parts = [[row.label, *_cells(row, unit)] for row in comparison.rows]
    phases = [[row.label, *_cells(row, unit)] for row in comparison.phases]
    counters = [[row.label, *_cells(row, unit)] for row in comparison.counters]
    sections = [
        "# Memory",
        f"{comparison.summary}.",
        f"{comparison.fit}. {comparison.workload[0].upper()}{comparison.workload[1:]}.",
        _table([unit.name, *COLUMNS, "error"], [*parts, [*total, comparison.total.error]]),
        RULE_OF_THUMB,
        "## Phases of a step",
        _table([f"peak, {unit.name}", *COLUMNS[2:], "error"], phases),
        "## Allocator, driver and operating system" if counters else "",
        _table([unit.name, *COLUMNS[2:], "error"], counters) if counters else "",
        "## The rule of thumb compared with this run",
        "\n".join(f"- {remark}" for remark in memory["documents"]["remarks"]),
        "![Bars: rule of thumb, forecast and measurement; memory in the course of a step, by part](memory.png)",
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def table(memory: Mapping[str, Any]) -> "Group":
    """Return the peak in a sentence and a table of the parts, at most 100 columns wide, with its footnote.

    Parts without bytes and columns without numbers are left out.

    >>> Console().print(table(memory))
    """
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    comparison = Comparison(memory)
    unit, names = comparison.unit, [*COLUMNS, "error"] if comparison.measured else COLUMNS[:-1]
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    shown.add_column(unit.name, overflow="fold")  # without room the labels wrap, never the numbers
    for name in names:
        shown.add_column(name.replace("rule of thumb: ", "rule of\nthumb:\n"), justify="right", no_wrap=True)
    for row in comparison.rows:
        shown.add_row(row.label, *_cells(row, unit)[: len(names)])
    shown.add_section()
    shown.add_row("total", *_cells(comparison.total, unit)[: len(names)], style="bold")
    return Group(Text(comparison.summary, style="bold"), shown, Text(RULE_OF_THUMB_IN_SHORT, style="dim"))


def _cells(row: Row, unit: Unit) -> list[str]:
    """Return the sizes and the error as text."""
    return [*row.cells(unit), row.error]


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table: labels to the left, numbers to the right."""
    header = list(header)
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
