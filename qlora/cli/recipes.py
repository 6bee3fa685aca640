"""`qlora recipes`: the recipes shipped with the package, and the schema of a recipe."""

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="List, show and copy the shipped recipes; print the schema of a recipe.", no_args_is_help=True
)

GIB = 2**30

Name = Annotated[
    str, typer.Argument(metavar="NAME", help="Name of a shipped recipe (see `qlora recipes list`).")
]


@app.command("list")
def list_recipes() -> None:
    """List the shipped recipes: the GPU memory that each needs (a forecast), the smallest card with it, the purpose."""
    from qlora.memory.gpus import smallest
    from qlora.recipe import shipped

    memory = shipped.memory()
    rows = [("recipe", "needs", "fits from", "purpose")]
    for name in shipped.names():
        needed_bytes = memory.get(name)
        card = None if needed_bytes is None else smallest(needed_bytes)
        needs = "" if needed_bytes is None else f"{needed_bytes / GIB:.1f} GiB"
        fits = "" if card is None else f"{card.marketed_gb} GB ({card.name})"
        rows.append((name, needs, fits, shipped.summary(name)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, needs, fits, purpose in rows:
        print(f"{name:{widths[0]}}  {needs:>{widths[1]}}  {fits:{widths[2]}}  {purpose}")


@app.command("show")
def show(
    name: Name,
    resolved: Annotated[bool, typer.Option("--resolved", help="Include every default value.")] = False,
) -> None:
    """Print a shipped recipe as YAML.

    [bold]qlora recipes show llama-7b --resolved[/bold]
    """
    from qlora.recipe import Recipe, shipped

    print(Recipe.load(name).to_yaml() if resolved else shipped.text(name), end="")


@app.command("copy")
def copy(
    name: Name,
    destination: Annotated[
        Path | None,
        typer.Argument(metavar="[DEST]", help="File or folder. Default: NAME.yaml in this folder."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Copy a shipped recipe to a file that you can edit.

    [bold]qlora recipes copy llama-7b my.yaml[/bold]
    """
    from qlora.recipe import shipped

    path = shipped.copy(name, destination or Path(), overwrite=force)
    print(f"Wrote {path}. Run it: qlora train {path}")


@app.command("schema")
def schema() -> None:
    """Print the JSON schema of a recipe, for completion and checks in an editor."""
    from qlora.recipe import Recipe

    print(json.dumps(Recipe.json_schema(), indent=2, ensure_ascii=False))
