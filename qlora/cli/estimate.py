"""`qlora estimate`: forecast a run's memory from its recipe and the model's config.json."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from qlora.cli.arguments import IMPORTS, Json, Overrides, Quiet, RecipeArgument, Verbose, startup_for

if TYPE_CHECKING:
    from qlora.memory.estimate import Estimate

Gpu = Annotated[
    str | None,
    typer.Option(
        "--gpu", metavar="SIZE", help="Memory of the GPU, such as 24GiB. Default: the GPU of this machine."
    ),
]


def estimate(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    gpu: Gpu = None,
    json_output: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Forecast the memory of a run, part by part, and check whether it fits.

    Needs no GPU and downloads only a config.json.
    The lengths of rows are read from local data; rows of data on the hub
    are assumed to be as long as the recipe allows.

    [bold]qlora estimate llama-65b --gpu 48GiB[/bold]
    [bold]qlora estimate my.yaml training.micro_batch_size=8[/bold]
    """
    startup = startup_for(quiet=quiet, verbose=verbose, json_output=json_output)
    from qlora.recipe import Recipe
    from qlora.recipe.sizes import parse_size

    loaded = Recipe.load(recipe, overrides or [])
    try:
        capacity = None if gpu is None else parse_size(gpu)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--gpu") from error
    with startup.stage(IMPORTS):
        from qlora.memory.estimate import estimate as forecast

    with startup.stage("forecasting memory") as progress:
        result = forecast(loaded, capacity, progress)
    if json_output:
        print(json.dumps(result.as_json()))
    else:
        _print(result)


def _print(result: "Estimate") -> None:
    from rich.console import Console

    from qlora.report.memory_files import table

    console = Console(highlight=False)
    console.print(table(result.memory))
    for line in result.lines():
        console.print(line, soft_wrap=True, markup=False)
