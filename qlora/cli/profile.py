"""`qlora profile`: measure a recipe's memory and compare it with the forecast and the rule of thumb."""

import json
from pathlib import Path
from typing import Annotated

import typer

from qlora.cli.arguments import Json, Overrides, RecipeArgument


def profile(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Number of optimizer steps.")] = 5,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write memory.json, memory.md and memory.png to this folder.")
    ] = None,
    json_output: Json = False,
) -> None:
    """Train for a few steps and compare the measured memory with the forecast.

    Every tensor is counted. The run itself is discarded; pass --out to keep
    the memory report.

    [bold]qlora profile quickstart --steps 5[/bold]
    """
    from qlora.recipe import Recipe

    loaded = Recipe.load(recipe, overrides or [])
    from qlora.report.memory_files import table, write
    from qlora.training.profile import profile as measured

    memory = measured(loaded, steps, terminal=not json_output)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write(out, memory)
    if json_output:
        print(json.dumps(memory))
        return
    from rich.console import Console

    Console(highlight=False).print(table(memory))
