"""`qlora report`: one page about a run."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, finished or not.")],
) -> None:
    """Write RUN/report.html, a page with a run's curves, samples, memory and recipe.

    The page is one file and needs no network, so you can send it to others.

    [bold]qlora report runs/quickstart[/bold]
    """
    from qlora.report.page import write_page

    print(write_page(run))
