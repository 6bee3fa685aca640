"""Tables about an adapter's layers, printed to a terminal or a log."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

    from qlora.adapter.algebra.changes import Change
    from qlora.adapter.algebra.compose import ApproximationError
    from qlora.adapter.algebra.spectrum import Spectrum

Value = TypeVar("Value")

WIDEST = 10_000
"""columns of the widest table"""


def grouped(layers: Mapping[str, Value], per_layer: bool) -> dict[str, list[Value]]:
    """Group the layers by kind (such as q_proj); `per_layer` makes one group per layer."""
    from qlora.adapter.algebra.module_types import places

    if per_layer:
        return {name: [value] for name, value in layers.items()}
    groups: dict[str, list[Value]] = {}
    for name, (kind, _) in places(layers).items():
        groups.setdefault(kind, []).append(layers[name])
    return groups


def show_deviations(deviations: "Mapping[str, ApproximationError]", per_layer: bool) -> None:
    """Print each group's ranks, and the error of the stored updates relative to the exact ones."""
    from qlora.adapter.algebra.compose import relative_error

    show(
        ["", "layers", "rank", "relative error"],
        [
            [name, str(len(group)), span([x.rank for x in group]), small(relative_error(group))]
            for name, group in grouped(deviations, per_layer).items()
        ],
    )


def show_spectra(layers: "Mapping[str, Spectrum]", per_layer: bool) -> None:
    """Print norms and ranks: of each layer, or the medians of each kind of layer."""
    rows = []
    for name, group in grouped(layers, per_layer).items():
        relative = [x.relative_norm for x in group if x.relative_norm is not None]
        rows.append(
            [
                name,
                str(len(group)),
                span([x.rank for x in group]),
                f"{median(x.norm for x in group):.3g}",
                f"{median(relative):.1%}" if relative else "-",
                f"{median(x.effective_rank for x in group):.1f}",
                f"{median(x.rank_for(0.9) for x in group):g}",
                f"{median(x.rank_for(0.99) for x in group):g}",
                f"{median(x.last_quarter for x in group):.2%}",
            ]
        )
    head = ["", "layers", "rank", "norm", "of base", "effective rank", "90%", "99%", "last quarter"]
    show(head, rows)


def show_changes(layers: "Mapping[str, Change]", per_layer: bool) -> None:
    """Print the norms of changes and the method's own numbers: of each layer, or the medians of each kind of layer."""
    headings = next(iter(layers.values())).numbers
    rows = []
    for name, group in grouped(layers, per_layer).items():
        relative = [x.relative_norm for x in group if x.relative_norm is not None]
        rows.append(
            [
                name,
                str(len(group)),
                f"{median(x.norm for x in group):.3g}",
                f"{median(relative):.1%}" if relative else "-",
                *(f"{median(x.numbers[heading] for x in group):.3g}" for heading in headings),
            ]
        )
    show(["", "layers", "norm of change", "of base", *headings], rows)


def show(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table with its first column left-aligned; no column is cut."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for number, title in enumerate(head):
        table.add_column(title, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    print_table(table)


def show_in_parts(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table as `show` does; on a terminal that is too narrow, in parts, each with the first column."""
    from rich.console import Console

    console = Console()
    parts: list[list[int]] = [[]]
    widths = [
        max(len(line) for text in column for line in text.split("\n")) + 2
        for column in zip(head, *rows, strict=True)
    ]
    for number in range(1, len(head)):
        if parts[-1] and console.is_terminal:
            used = sum(widths[n] for n in (0, *parts[-1], number))
            if used > console.width:
                parts.append([])
        parts[-1].append(number)
    for index, part in enumerate(parts):
        if index:
            print()
        show([head[n] for n in (0, *part)], [[row[n] for n in (0, *part)] for row in rows])


def print_table(table: "Table | Group") -> None:
    """Print a table on standard output in its full width; in a file or a pipe, without padding."""
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    unbounded = console.options.update(width=WIDEST)  # else the measure ends at the console's width
    width = max(console.width, console.measure(table, options=unbounded).maximum)
    console.width = width
    if console.is_terminal:
        console.print(table, soft_wrap=True, width=width)
        return
    with console.capture() as shown:
        console.print(table, soft_wrap=True, width=width)
    print("\n".join(line.rstrip() for line in shown.get().splitlines()))


def say(text: str) -> None:
    """Print a paragraph, wrapped to the width of the terminal."""
    from rich.console import Console

    Console(highlight=False, markup=False).print(text)


def small(share: float) -> str:
    """Format a share as a percentage, or as a power of ten if the percentage would round to zero."""
    return f"{share:.2%}" if share >= 1e-4 else f"{share:.0e}" if share else "0"


def span(numbers: Sequence[int]) -> str:
    """Format the range of `numbers`: `8` if all are equal, else `4-16`."""
    return str(min(numbers)) if min(numbers) == max(numbers) else f"{min(numbers)}-{max(numbers)}"
