"""The shipped recipes: next to the package in a checkout, inside it in a wheel."""

import json
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path

from qlora.errors import RecipeError, SaveError, UsageError

PACKAGE = Path(__file__).parents[1]

MEMORY_FILE = PACKAGE / "bundled/recipe_memory.json"


def folder() -> Path:
    """Return the folder of the shipped recipes."""
    installed = PACKAGE / "_recipes"  # pyproject.toml copies the recipes there when a wheel is built
    return installed if installed.is_dir() else PACKAGE.parent / "recipes"


def names() -> list[str]:
    """Return the names of the shipped recipes, sorted."""
    return sorted(file.stem for file in folder().glob("*.yaml"))


def path(name: str) -> Path:
    """Return the file of a shipped recipe."""
    return folder() / f"{name}.yaml"


def text(name: str) -> str:
    """Return the YAML text of a shipped recipe.

    Raises:
        RecipeError: there is no shipped recipe with this name.
    """
    if name not in names():
        near = nearest(name)
        raise RecipeError(
            f"{name!r}: no such shipped recipe; "
            + (f"did you mean '{near}'?" if near else f"the shipped recipes are {', '.join(names())}")
        )
    return path(name).read_text(encoding="utf-8")


def summary(name: str) -> str:
    """Return the one-line summary of a shipped recipe, the comment in its second line."""
    return text(name).splitlines()[1].removeprefix("# ")


def memory() -> dict[str, int]:
    """Return the forecast bytes that each recipe needs on a GPU, as benchmarks/recipe_memory.py stored them."""
    return dict(json.loads(MEMORY_FILE.read_text(encoding="utf-8"))) if MEMORY_FILE.is_file() else {}


def write_memory(found: Mapping[str, int]) -> None:
    """Store what `memory` returns, sorted by name."""
    MEMORY_FILE.write_text(json.dumps(dict(found), indent=2, sort_keys=True) + "\n", encoding="utf-8")


def nearest(name: str) -> str | None:
    """Return the most similar name of a shipped recipe; None if no name is similar."""
    return next(iter(get_close_matches(name, names(), n=1)), None)


def copy(name: str, destination: Path, *, overwrite: bool = False) -> Path:
    """Copy a shipped recipe to a file or into a folder, and return the path of the copy.

    The command in the first line of the copy names the copy.

    Raises:
        UsageError: the file exists, and `overwrite` is false or it is a pipe or device.
        SaveError: the file cannot be written.
    """
    content = text(name)
    target = destination / f"{name}.yaml" if destination.is_dir() else destination
    if overwrite and target.exists() and not target.is_file():
        raise UsageError(f"{target}: not a regular file; choose another name")
    try:
        with target.open("w" if overwrite else "x", encoding="utf-8") as file:
            file.write(content.replace(f"# qlora train {name}", f"# qlora train {target}", 1))
    except FileExistsError:
        raise UsageError(
            f"{target}: already exists; choose another name, or overwrite it with --force"
        ) from None
    except OSError as error:
        raise SaveError(f"{target}: cannot be written: {error.strerror}") from None
    return target
