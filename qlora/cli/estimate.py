"""`qlora estimate`: forecast a run's memory from its recipe and the model's config.json."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from qlora.cli.arguments import IMPORTS, Json, Overrides, Quiet, RecipeArgument, Verbose, startup_for

if TYPE_CHECKING:
    from qlora.memory.estimate import Estimate


def _list_cards(gpu: str | None) -> str | None:
    if gpu == "list":
        from qlora.memory.gpus import listed_cards

        print(listed_cards())
        raise typer.Exit
    return gpu


Gpu = Annotated[
    str | None,
    typer.Option(
        "--gpu",
        metavar="CARD_OR_SIZE",
        is_eager=True,
        callback=_list_cards,
        help="Name of a GPU, such as rtx4090, or its memory, such as 24GiB; list shows the known names. "
        "Default: the GPU of this machine.",
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
    [bold]qlora estimate llama-3.1-8b --gpu rtx4090[/bold]
    [bold]qlora estimate my.yaml training.micro_batch_size=8[/bold]
    """
    startup = startup_for(quiet=quiet, verbose=verbose, json_output=json_output)
    from qlora.recipe import Recipe

    loaded = Recipe.load(recipe, overrides or [])
    from qlora.memory.gpus import capacity_bytes, computes_bfloat16

    capacity = None if gpu is None else capacity_bytes(gpu)
    if gpu is not None and loaded.base.compute_dtype == "auto" and not computes_bfloat16(gpu):
        startup.warn(f"--gpu: {gpu} has no bfloat16, so base.compute_dtype is float32 there")
        base = loaded.base.model_copy(update={"compute_dtype": "float32"})
        loaded = loaded.model_copy(update={"base": base})
    with startup.stage(IMPORTS):
        from qlora.memory.estimate import estimate as forecast

    with startup.stage("forecasting memory") as progress:
        result = forecast(loaded, capacity, progress)
    if json_output:
        print(json.dumps(result.as_json()))
    else:
        _print(result)


def _print(result: "Estimate") -> None:
    from qlora.cli.memory import assumptions, print_memory

    print_memory(result.memory)
    for line in (*assumptions(result.memory), *result.lines()):
        print(line)
