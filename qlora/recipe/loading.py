"""Finds and reads a recipe, and distinguishes a recipe written by hand from one that came with results."""

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora.errors import ModelError, RecipeError
from qlora.recipe import shipped
from qlora.recipe.checking import check
from qlora.recipe.overrides import override
from qlora.recipe.problems import FORBIDDEN, Document, Place, shorten
from qlora.recipe.reading import read
from qlora.recipe.schema import Recipe
from qlora.recipe.versions import translate

RESULTS = (
    "adapter_config.json", "qlora.json", "run.json", "result.json", "metrics.jsonl", "checkpoints/step-*/manifest.json",
)  # fmt: skip
"""files that mark a folder, with all below it, as an adapter or a run; one of them is enough"""

WHOLE_MODEL = ("config.json", "*.safetensors")
"""files that together mark a folder, with all below it, as a model"""

RESULTS_HERE = ("config.json", "manifest.json", "adapter/adapter_config.json", "model/recipe.yaml")
"""files that mark the recipe's own folder as results; one of them is enough"""

MAX_LINKS = 40  # the limit of Linux
MAX_BYTES = 64 * 1024  # bounds the parsing time; the longest shipped recipe has 1 KiB


def load(name_or_path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply the overrides, and check it; see `Recipe.load`.

    Raises:
        RecipeError: the recipe is wrong; the message has one line per problem.
        ModelError: a recipe among results allows the base's code to run. It can come from a stranger; only an override
            can allow it.
    """
    path = locate(name_or_path)
    results = _results_around(path)
    document = _document(path, overrides, recorded=results is not None)
    if results is not None:
        _refuse_code_of_results(document, results)
    return check(document, path.stem)


def load_recorded(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read the recipe of a run or an adapter, without the check of `trust_remote_code`; see `Recipe.recorded`."""
    return check(_document(path, overrides, recorded=True), path.stem)


def _document(path: Path, overrides: Sequence[str], *, recorded: bool) -> Document:
    document = read(_text(path), str(path))
    if document.value is None:
        document.value = {}
    translate(document, recorded=recorded)
    for argument in overrides:
        override(document, argument)
    return document


def _refuse_code_of_results(document: Document, results: Path) -> None:
    """Raise ModelError if a recipe among results, and not an override, allows the base's code to run."""
    place = document.place(("base", "trust_remote_code"))
    if document.setting("base", "trust_remote_code") is True and place.line:
        model = document.setting("base", "model")
        raise ModelError(
            f"{place}: base.trust_remote_code: would run code of {shorten(str(model), 200)!r}, and a "
            f"recipe among results ({results}) cannot allow that. If you trust the code, set "
            "base.trust_remote_code=true on the command line"
        )


def _results_around(path: Path) -> Path | None:
    """Return the folder of the run, adapter, checkpoint or model that contains the recipe; None if there is none."""
    for file in _links(path):
        for folder in file.parents:
            names = RESULTS + RESULTS_HERE if folder == file.parent else RESULTS
            if any(_holds(folder, name) for name in names) or all(
                _holds(folder, name) for name in WHOLE_MODEL
            ):
                return folder
    return None


def _holds(folder: Path, name: str) -> bool:
    return any(folder.glob(name))


def _links(path: Path) -> Iterator[Path]:
    """Yield the path itself, each symbolic link that it leads through, and the final file."""
    place = path.absolute()
    for _ in range(MAX_LINKS):
        yield place
        yield place.parent.resolve() / place.name
        if not place.is_symlink():
            return
        place = place.parent.resolve() / place.readlink()


def from_dict(settings: Mapping[str, Any], name: str) -> Recipe:
    """Check nested dictionaries like a recipe file called `name`; see `Recipe.from_dict`."""
    document = Document(name, _plain(settings))
    translate(document, recorded=False)
    return check(document, name)


def _plain(value: Any) -> Any:
    """Convert containers to those that YAML gives: dictionaries with text keys, and lists."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def locate(name_or_path: str | os.PathLike[str]) -> Path:
    """Return the file of a recipe, given by the name of a shipped recipe or by its path.

    Raises:
        RecipeError: there is no such file.
    """
    given = os.fspath(name_or_path)
    if given in shipped.names():
        return shipped.path(given)
    try:
        path = Path(given).expanduser()
        mode = path.stat().st_mode
    # ValueError: the name has a NUL; RuntimeError: `~user` has no home
    except (OSError, ValueError, RuntimeError):
        near = shipped.nearest(Path(given).stem)
        hint = f"did you mean {near!r}?" if near else "`qlora recipes list` shows the shipped ones"
        raise RecipeError(f"{shorten(given, 200)!r}: no such file or shipped recipe; {hint}") from None
    _check_regular(given, mode)
    return path


def _check_regular(given: str, mode: int) -> None:
    """Raise RecipeError for a folder, and for a pipe or device, whose reader could wait for ever."""
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
        raise RecipeError(f"{given!r}: is {kind}; a recipe is a YAML file")


def _text(path: Path) -> str:
    """Return the text of a recipe file, which must be short, in UTF-8 and free of control characters."""
    try:
        _check_regular(str(path), path.stat().st_mode)
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    if len(content) > MAX_BYTES:
        raise RecipeError(f"{path}: is longer than {MAX_BYTES // 1024} KiB; a recipe must be shorter")
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise RecipeError(f"{path}:1:1: is UTF-16; save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = _place(path, content[: error.start].decode("utf-8-sig"))
        raise RecipeError(
            f"{place}: byte 0x{content[error.start]:02X} is not UTF-8; save the file as UTF-8"
        ) from None
    if match := FORBIDDEN.search(text):
        place = _place(path, text[: match.start()])
        raise RecipeError(
            f"{place}: the character U+{ord(match.group()):04X} is not allowed in YAML; delete it"
        )
    return text


def _place(path: Path, before: str) -> Place:
    """Return the place right after the text `before`."""
    return Place(str(path), before.count("\n") + 1, len(before) - before.rfind("\n"))
