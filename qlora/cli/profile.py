"""`qlora profile`: measure a recipe's memory and compare it with the forecast and the rule of thumb."""

import json
from pathlib import Path
from typing import Annotated

import typer

from qlora.cli.arguments import IMPORTS, Json, Overrides, Quiet, RecipeArgument, Verbose, startup_for
from qlora.cli.memory import print_memory


def profile(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Number of optimizer steps.")] = 5,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write memory.json, memory.md and memory.png to this folder.")
    ] = None,
    json_output: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train for a few steps and compare the measured memory with the forecast.

    Every tensor is counted; the stages of the start are timed. The run itself is discarded; pass --out to keep
    the memory report.

    [bold]qlora profile quickstart --steps 5[/bold]
    """
    startup = startup_for(quiet=quiet, verbose=verbose, json_output=json_output)
    from qlora.recipe import Recipe

    loaded = Recipe.load(recipe, overrides or [])
    with startup.stage(IMPORTS):
        from qlora.report.memory_files import write
        from qlora.training.profile import profile as measured

    memory = measured(loaded, steps, startup=startup)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write(out, memory)
    if json_output:
        print(json.dumps({**memory, "stages": startup.seconds}))
        return
    print_memory(memory)
    stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in startup.seconds.items())
    print(f"Start: {stages}.")
