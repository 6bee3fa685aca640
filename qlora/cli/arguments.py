"""Arguments and options shared by several commands."""

from typing import Annotated

import typer

RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="Name of a shipped recipe (see `qlora recipes list`) or path of a YAML file."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE", help="Change settings of the recipe, such as training.max_steps=100."
    ),
]
AnyBase = Annotated[
    bool,
    typer.Option(
        "--any-base", help="Use the adapter even if its base or tokenizer is not the one from training."
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Let the base run its own Python code in this call. A recipe stored with results cannot allow that.",
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object, and nothing else, on standard output.")
]
