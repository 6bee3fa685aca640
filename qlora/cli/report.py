"""`qlora report`: a run on one page."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, finished or not.")],
) -> None:
    """Write RUN/report.html: one page with the curves, samples, memory and recipe of a run, to open or to send.

    [bold]qlora report runs/quickstart[/bold]
    """
    from qlora.report.page import write_page

    print(write_page(run))
