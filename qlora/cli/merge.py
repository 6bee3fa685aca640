"""`qlora merge`: write base + adapter as one model, and judge the difference."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from qlora.cli.arguments import IMPORTS, AnyBase, Device, Json, TrustRemoteCode, show_device, startup_for
from qlora.cli.tables import print_table

if TYPE_CHECKING:
    from rich.table import Table

    from qlora.merging.merge import Merged, Progress

MiB = 2**20

CHOICES = ("auto", "original", "dequantized", "nf4")

ONTO_HELP = (
    "Add the adapter to the 16-bit weights (original), to the dequantized NF4 weights (dequantized), or to these and "
    "quantize again (nf4). auto writes each, compares them with base + adapter on held-out text, and keeps the best in "
    "16 bits."
)


def merge(
    adapter: Annotated[
        str, typer.Argument(metavar="RUN_OR_ADAPTER", help="Folder of a run or of an adapter.")
    ],
    to: Annotated[
        str, typer.Option("--to", metavar="DIR", help="Folder of the merged model; it must not exist.")
    ],
    onto: Annotated[str, typer.Option(metavar="|".join(CHOICES), help=ONTO_HELP)] = "auto",
    data: Annotated[
        str | None,
        typer.Option(
            help="File of held-out rows in the recipe's format. Default: the recipe's held-out rows."
        ),
    ] = None,
    original: Annotated[
        str | None,
        typer.Option(
            help="The 16-bit weights (folder or hub id), if the recipe's base is a 4-bit checkpoint."
        ),
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=0, help="Maximum number of tokens to compare on; 0 skips the comparison.")
    ] = 20_000,
    any_base: AnyBase = False,
    trust_remote_code: TrustRemoteCode = False,
    device: Device = "auto",
    json_output: Json = False,
) -> None:
    """Merge an adapter into its base and write an ordinary Hugging Face model.

    Each way is compared on held-out text, and the best in 16 bits is kept (--onto sets one; nf4 only by asking).

    [bold]qlora merge runs/quickstart --to models/tickets[/bold]
    """
    if onto not in CHOICES:
        raise typer.BadParameter(f"--onto must be one of {', '.join(CHOICES)}, not {onto!r}")
    startup = startup_for(json_output=json_output)
    with startup.stage(IMPORTS):
        from qlora.merging.merge import merge as run
    show_device(startup, device)
    with shown_progress() as progress:
        merged = run(
            adapter,
            to,
            onto=onto,  # type: ignore[arg-type]
            data=data,
            original=original,
            max_tokens=tokens,
            device=device,
            any_base=any_base,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if json_output:
        print(json.dumps(merged.as_json()))
    else:
        _show(merged)


def _show(merged: "Merged") -> None:
    """Print the verdict, the reason for the choice, and how to load the model."""
    from rich.console import Console

    from qlora.data.prompt_files import SYSTEM_FILE, shared_system

    console = Console(highlight=False, markup=False, soft_wrap=True)
    if merged.live is not None:
        print_table(table(merged))
    console.print(f"{merged.onto}: {merged.why}")
    console.print(f"written  {merged.folder}  ({_mebibytes(merged.weight_bytes)} MiB of weights)")
    console.print(
        f'use it   AutoModelForCausalLM.from_pretrained("{merged.folder}"), or base.model={merged.folder}'
    )
    if shared_system(merged.folder) is not None:
        console.print(
            f"note     all training rows begin with the system prompt in {merged.folder / SYSTEM_FILE}; a server does "
            "not read that file, so give it the prompt"
        )


def table(merged: "Merged") -> "Table":
    """Build the table of the verdict: one row for the live model and one for each judged merge."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    title = f"compared with the live base + adapter on {merged.tokens:,} held-out tokens"
    rows = Table(box=SIMPLE_HEAD, title=title, title_justify="left", title_style="")
    rows.add_column("merged onto")
    for heading in ("KL, nats", "perplexity", "same top-1", "weights, MiB"):
        rows.add_column(heading, justify="right")
    for one in [merged.live, *merged.judged]:
        assert one is not None
        live = one is merged.live
        rows.add_row(
            "(live)" if live else one.name,
            "" if live else f"{one.kl:.2g}",
            f"{one.perplexity:.4f}",
            "" if live else f"{one.agreement:.2%}",
            _mebibytes(one.weight_bytes),
            style="bold" if one.name == merged.onto else "",
        )
    return rows


def _mebibytes(size: int) -> str:
    return f"{size / MiB:,.1f}"


@contextmanager
def shown_progress() -> Iterator["Progress"]:
    """Show a progress bar if standard error is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(file=sys.stderr)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def update(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        yield update
