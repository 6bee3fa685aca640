"""The recipes that come with the package: beside it in a checkout, inside it in a wheel."""

from difflib import get_close_matches
from pathlib import Path

from qlora.errors import RecipeError, SaveError, UsageError

PACKAGE = Path(__file__).parents[1]


def folder() -> Path:
    """Where the shipped recipes are."""
    installed = PACKAGE / "_recipes"  # put there when the wheel is built
    return installed if installed.is_dir() else PACKAGE.parent / "recipes"


def names() -> list[str]:
    """The names of the shipped recipes, sorted."""
    return sorted(file.stem for file in folder().glob("*.yaml"))


def path(name: str) -> Path:
    """The file of a shipped recipe."""
    return folder() / f"{name}.yaml"


def text(name: str) -> str:
    """A shipped recipe as it is written; raises `RecipeError` if there is none of that name."""
    if name not in names():
        near = nearest(name)
        raise RecipeError(
            f"{name!r}: no such shipped recipe; "
            + (f"did you mean '{near}'?" if near else f"there are {', '.join(names())}")
        )
    return path(name).read_text(encoding="utf-8")


def summary(name: str) -> str:
    """What a recipe is for: its second line, a comment."""
    return text(name).splitlines()[1].removeprefix("# ")


def nearest(name: str) -> str | None:
    """The shipped recipe with the most similar name, if one is similar."""
    return next(iter(get_close_matches(name, names(), n=1)), None)


def copy(name: str, destination: Path, *, overwrite: bool = False) -> Path:
    """Copy a shipped recipe to a file, or into a folder; the launch command in its first line names the copy.

    Raises `UsageError` if the file exists and may not be overwritten, `SaveError` if it cannot be written.
    """
    content = text(name)
    target = destination / f"{name}.yaml" if destination.is_dir() else destination
    try:
        with target.open("w" if overwrite else "x", encoding="utf-8") as file:
            file.write(content.replace(f"# qlora train {name}", f"# qlora train {target}", 1))
    except FileExistsError:
        raise UsageError(
            f"{target}: exists already; choose another name, or overwrite it with --force"
        ) from None
    except OSError as error:
        raise SaveError(f"{target}: cannot be written: {error.strerror}") from None
    return target
