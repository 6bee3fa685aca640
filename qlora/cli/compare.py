"""`qlora compare`: several runs as a table and as a picture."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from qlora.cli.arguments import Json
from qlora.cli.tables import show_in_parts


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Folders of runs, finished or not.")],
    picture: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Also draw the losses of all runs into FILE, a new .png, .svg or .pdf."
        ),
    ] = None,
    json_output: Json = False,
) -> None:
    """Compare runs: the settings that differ, losses, memory, speed and time.

    Runs can be unfinished, damaged, or of an earlier version. The lowest
    held-out loss has a mark, if the losses are losses on the same tokens.

    [bold]qlora compare runs/lr-*[/bold]
    [bold]qlora compare runs/lr-* --picture rates.png[/bold]
    """
    from qlora.report import run_curves
    from qlora.report.run_comparison import compare as compared
    from qlora.report.run_files import read_runs
    from qlora.report.run_table import legend, table

    if picture is not None:
        run_curves.check_absent(picture)
    comparison = compared(read_runs(runs))
    if picture is not None:
        run_curves.write(comparison, picture)
    if json_output:
        print(json.dumps({**comparison.as_json(), "picture": picture and str(picture)}))
        return
    show_in_parts(*table(comparison))
    for line in legend(comparison):
        print(line)
    for note in comparison.notes:
        print(f"note  {note}", file=sys.stderr)
    if picture is not None:
        print(picture)
