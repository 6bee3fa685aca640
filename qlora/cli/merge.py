"""`qlora merge`: base + adapter as one model, with a verdict on what that changed."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from qlora.cli.arguments import AnyBase, Json, TrustRemoteCode

if TYPE_CHECKING:
    from rich.table import Table

    from qlora.merging.merge import Merged, Progress

MiB = 2**20

CHOICES = ("auto", "original", "dequantized", "nf4")


def merge(
    adapter: Annotated[
        str, typer.Argument(metavar="RUN_OR_ADAPTER", help="A run's folder or an adapter's folder.")
    ],
    to: Annotated[str, typer.Option("--to", metavar="DIR", help="The folder to make.")],
    onto: Annotated[
        str,
        typer.Option(
            metavar="|".join(CHOICES),
            help="What to add the adapter to: the 16-bit weights; the NF4 weights, dequantized; these, quantized "
            "again. auto judges all of them and keeps the best.",
        ),
    ] = "auto",
    data: Annotated[
        str | None,
        typer.Option(help="Held-out text to judge by, laid out as the recipe's rows; else the recipe's own."),
    ] = None,
    original: Annotated[
        str | None,
        typer.Option(help="Where the 16-bit weights are, if the recipe's base is in 4 bits already."),
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=0, help="Judge by so many supervised tokens at most; 0: no verdict.")
    ] = 20_000,
    any_base: AnyBase = False,
    trust_remote_code: TrustRemoteCode = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    json_output: Json = False,
) -> None:
    """Add an adapter into its base and write an ordinary Hugging Face model.

    [bold]qlora merge runs/quickstart --to models/tickets[/bold]
    """
    if onto not in CHOICES:
        raise typer.BadParameter(f"--onto is one of {', '.join(CHOICES)}, not {onto!r}")
    from qlora.merging.merge import merge as run

    with _shown_progress() as progress:
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
    """The verdict, why this choice, and what to do with it."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, soft_wrap=True)
    if merged.live is not None:
        console.print(table(merged))
    console.print(f"{merged.onto}: {merged.why}")
    console.print(f"written  {merged.folder}  ({_mebibytes(merged.weight_bytes)} MiB of weights)")
    console.print(
        f'use it   AutoModelForCausalLM.from_pretrained("{merged.folder}"), or base.model={merged.folder}'
    )


def table(merged: "Merged") -> "Table":
    """The verdict: a row for the live model and each merge that was judged."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    title = f"judged by {merged.tokens:,} held-out tokens against the live base + adapter"
    shown = Table(box=SIMPLE_HEAD, title=title, title_justify="left", title_style="")
    shown.add_column("merged onto")
    for heading in ("KL, nats", "perplexity", "same top-1", "weights, MiB"):
        shown.add_column(heading, justify="right")
    for one in [merged.live, *merged.judged]:
        assert one is not None
        live = one is merged.live
        shown.add_row(
            "(live)" if live else one.name,
            "" if live else f"{one.kl:.2g}",
            f"{one.perplexity:.4f}",
            "" if live else f"{one.agreement:.2%}",
            _mebibytes(one.weight_bytes),
            style="bold" if one.name == merged.onto else "",
        )
    return shown


def _mebibytes(size: int) -> str:
    return f"{size / MiB:,.1f}"


@contextmanager
def _shown_progress() -> Iterator["Progress"]:
    """A bar on standard error where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(file=sys.stderr)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def update(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        yield update
