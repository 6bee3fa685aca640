"""Arguments and options shared by several commands."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from qlora.tracking.startup import Startup

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
RunOrAdapter = Annotated[
    str, typer.Argument(metavar="RUN_OR_ADAPTER", help="Folder of a run or of an adapter.")
]
OtherAdapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter", metavar="NAME=FOLDER", help="Another adapter of the same base. Can be repeated."
    ),
]
Device = Annotated[str, typer.Option(help="Device: auto, cpu, cuda, or cuda:1 for the second GPU.")]
System = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        help="System prompt. Default: that of all training rows, if they share one; '' for none.",
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object, and nothing else, on standard output.")
]
IMPORTS = "loading torch and transformers"
"""name of the stage in which a command imports large libraries"""

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress, only warnings and errors.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Also show how long each stage takes.")]


def startup_for(*, quiet: bool = False, verbose: bool = False, json_output: bool = False) -> "Startup":
    """Return the display of a command's stages for its options. Only the main process of a run shows them.

    Raises:
        BadParameter: quiet and verbose are both set.
        UsageError: a variable of a launcher is wrong.
    """
    from qlora.runtime.launch import is_main
    from qlora.tracking.startup import Startup

    if quiet and verbose:
        raise typer.BadParameter("--quiet and --verbose cannot be used together; leave one out")
    return Startup(shown=is_main() and not (quiet or json_output), verbose=verbose)


def show_device(startup: "Startup", name: str) -> None:
    """Show the device that `--device` selects, before anything is loaded onto it.

    Raises:
        UsageError: there is no such device.
        ModelError: torch cannot use the driver of the GPU.
    """
    from qlora.runtime.device import device_name, device_named

    startup.table([("device", device_name(device_named(name)))])


def folders_by_name(adapters: list[str] | None) -> dict[str, str]:
    """Split the values of --adapter, NAME=FOLDER. Raises BadParameter."""
    named = {}
    for text in adapters or []:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder):
            raise typer.BadParameter(f"--adapter needs NAME=FOLDER, not {text!r}")
        if name in named:
            raise typer.BadParameter(f"--adapter: the name {name!r} is given twice; choose another name")
        named[name] = folder
    return named
