"""`qlora estimate`: will it fit? From the recipe and the model's config.json, before anything is downloaded."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from qlora.cli.arguments import Json, Overrides, RecipeArgument

if TYPE_CHECKING:
    from qlora.memory.estimate import Estimate

Gpu = Annotated[
    str | None,
    typer.Option(
        "--gpu", metavar="SIZE", help="Memory of the GPU in question, as 24GiB; this machine's, if left out."
    ),
]


def estimate(
    recipe: RecipeArgument, overrides: Overrides = None, gpu: Gpu = None, json_output: Json = False
) -> None:
    """Tell what memory a run will take, part by part, and whether it fits.

    Nothing is downloaded but a config.json, and no GPU is needed. Rows of a local file are read for their length;
    for data on the hub all rows are taken to be as long as the recipe allows.

    [bold]qlora estimate llama-65b --gpu 48GiB[/bold]
    [bold]qlora estimate my.yaml training.micro_batch_size=8[/bold]
    """
    from qlora.recipe import Recipe
    from qlora.recipe.sizes import parse_size

    loaded = Recipe.load(recipe, overrides or [])
    try:
        capacity = None if gpu is None else parse_size(gpu)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--gpu") from error
    from qlora.memory.estimate import estimate as of
    from qlora.tracking.status import status

    with status("reading the recipe", wanted=not json_output) as progress:
        found = of(loaded, capacity, progress)
    if json_output:
        print(json.dumps(found.as_json()))
    else:
        _print(found)


def _print(found: "Estimate") -> None:
    from rich.console import Console

    from qlora.report.memory_files import table

    console = Console(highlight=False)
    console.print(table(found.memory))
    for line in found.lines():
        console.print(line, soft_wrap=True, markup=False)
