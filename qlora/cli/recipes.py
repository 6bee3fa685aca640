"""`qlora recipes`: the recipes that come with the package, and the schema that all recipes follow."""

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="List, show and copy the shipped recipes; print the schema of a recipe.", no_args_is_help=True
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="A shipped recipe, see `qlora recipes list`.")]


@app.command("list")
def list_recipes() -> None:
    """Name every shipped recipe and what it is for."""
    from qlora.recipe import shipped

    names = shipped.names()
    width = max(map(len, names))
    for name in names:
        print(f"{name:{width}}  {shipped.summary(name)}")


@app.command("show")
def show(
    name: Name,
    resolved: Annotated[bool, typer.Option("--resolved", help="Write every default out.")] = False,
) -> None:
    """Print a shipped recipe."""
    from qlora.recipe import Recipe, shipped

    print(Recipe.load(name).to_yaml() if resolved else shipped.text(name), end="")


@app.command("copy")
def copy(
    name: Name,
    destination: Annotated[
        Path | None, typer.Argument(metavar="[DEST]", help="A file or folder; NAME.yaml here if left out.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Copy a shipped recipe, to change it."""
    from qlora.recipe import shipped

    path = shipped.copy(name, destination or Path(), overwrite=force)
    print(f"Wrote {path}. Run it: qlora train {path}")


@app.command("schema")
def schema() -> None:
    """Print the JSON schema of a recipe; editors complete and check from it."""
    from qlora.recipe import Recipe

    print(json.dumps(Recipe.json_schema(), indent=2, ensure_ascii=False))
