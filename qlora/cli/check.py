"""`qlora check`: a recipe's settings, rows, steps and memory, without training."""

import json
from typing import Annotated

import typer

from qlora.cli.arguments import IMPORTS, Json, Overrides, Quiet, RecipeArgument, Verbose, startup_for


def check(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    defaults: Annotated[
        bool,
        typer.Option(
            "--defaults", help="Only print the recipe with every default written out; read nothing else."
        ),
    ] = False,
    json_output: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Check a recipe, its base and its rows, and count rows, steps and memory.

    Nothing is trained or written, and no weights are downloaded. A line that
    begins with OK means that nothing wrong was found; lines that begin with
    "not checked" name what could not be read. A problem ends the command with
    a message and its exit code.

    [bold]qlora check my.yaml optimizer.lr=1e-4[/bold]
    [bold]qlora check my.yaml --defaults[/bold]
    """
    startup = startup_for(quiet=quiet, verbose=verbose, json_output=json_output)
    from qlora.recipe import Recipe

    loaded = Recipe.load(recipe, overrides or [])
    if defaults:
        print(loaded.to_yaml(), end="")
        return
    with startup.stage(IMPORTS):
        from qlora.training.check import check as run

    found = run(loaded, startup)
    if json_output:
        print(json.dumps(found.as_json()))
        return
    print(found.verdict())
    for label, text in found.rows() if not quiet else ():
        print(f"{label:15}{text}")
