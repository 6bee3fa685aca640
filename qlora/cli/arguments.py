"""Arguments that several commands share."""

from typing import Annotated

import typer

RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="A shipped recipe's name (see `qlora recipes list`) or a YAML file."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Change keys of the recipe, as in training.max_steps=20."),
]
AnyBase = Annotated[
    bool,
    typer.Option(
        "--any-base", help="Use the adapter although its base or tokenizer is another than in training."
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Let the base run code of its own, in this call: a recipe that came with results cannot allow it.",
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else there.")
]
