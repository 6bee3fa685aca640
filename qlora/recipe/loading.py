"""Find a recipe, read its file, and tell a person's own from one that came with results."""

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
"""files of which one shows that a folder, with all below it, holds an adapter or a run"""

WHOLE_MODEL = ("config.json", "*.safetensors")
"""files that together show that a folder, with all below it, holds a model"""

RESULTS_HERE = ("config.json", "manifest.json", "adapter/adapter_config.json", "model/recipe.yaml")
"""files of which one shows that the very folder of a recipe holds results"""

MAX_LINKS = 40  # Linux does not follow more
MAX_BYTES = 64 * 1024  # the longest shipped recipe is 1 KiB; parsing takes time in proportion


def load(name_or_path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and check a recipe; raises `RecipeError` with one line a problem.

    A file that lies among results may be a stranger's, so it cannot allow the base's code to run: `ModelError`. An
    override can.
    """
    path = locate(name_or_path)
    results = _results_around(path)
    document = _document(path, overrides, recorded=results is not None)
    if results is not None:
        _refuse_code_of_results(document, results)
    return check(document, path.stem)


def load_recorded(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read the recipe that came with a run or an adapter as it is; see `Recipe.recorded`."""
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
    """Raise ModelError where a recipe among results, and not the command line, lets the base's code run."""
    place = document.place(("base", "trust_remote_code"))
    if document.setting("base", "trust_remote_code") is True and place.line:
        model = document.setting("base", "model")
        raise ModelError(
            f"{place}: base.trust_remote_code: would run code of {shorten(str(model), 200)!r}, and a "
            f"recipe among results ({results}) is no consent. If you trust that code, say base.trust_remote_code=true "
            "on the command line"
        )


def _results_around(path: Path) -> Path | None:
    """The folder of a run, an adapter, a checkpoint or a whole model that a recipe lies in; None if in none."""
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
    """The places that a path leads through: itself, each link on the way, and the file that it comes to."""
    place = path.absolute()
    for _ in range(MAX_LINKS):
        yield place
        yield place.parent.resolve() / place.name
        if not place.is_symlink():
            return
        place = place.parent.resolve() / place.readlink()


def from_dict(settings: Mapping[str, Any], name: str) -> Recipe:
    """Check nested dictionaries as if they were a recipe file called `name`."""
    document = Document(name, _plain(settings))
    translate(document, recorded=False)
    return check(document, name)


def _plain(value: Any) -> Any:
    """Python's containers as YAML would give them: dictionaries with text as keys, and lists."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def locate(name_or_path: str | os.PathLike[str]) -> Path:
    """The file that a shipped name or a path means; raises `RecipeError` if there is none."""
    given = os.fspath(name_or_path)
    if given in shipped.names():
        return shipped.path(given)
    try:
        path = Path(given).expanduser()
        mode = path.stat().st_mode
    # a NUL in the name is a ValueError, the home of nobody a RuntimeError
    except (OSError, ValueError, RuntimeError):
        near = shipped.nearest(Path(given).stem)
        hint = f"did you mean {near!r}?" if near else "`qlora recipes list` names those shipped"
        raise RecipeError(f"{shorten(given, 200)!r}: no such file or shipped recipe; {hint}") from None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
        raise RecipeError(f"{given!r}: is {kind}; a recipe is a YAML file")
    return path


def _text(path: Path) -> str:
    """The text of a recipe's file, which must be short, UTF-8 and free of control characters."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    if len(content) > MAX_BYTES:
        raise RecipeError(f"{path}: is longer than {MAX_BYTES // 1024} KiB, and no recipe")
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise RecipeError(f"{path}:1:1: is UTF-16; save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = _place(path, content[: error.start].decode("utf-8-sig"))
        raise RecipeError(
            f"{place}: byte 0x{content[error.start]:02X} is not UTF-8; save the file as UTF-8"
        ) from None
    if found := FORBIDDEN.search(text):
        place = _place(path, text[: found.start()])
        raise RecipeError(
            f"{place}: the character U+{ord(found.group()):04X} cannot stand in YAML; delete it"
        )
    return text


def _place(path: Path, before: str) -> Place:
    """The place right after some text."""
    return Place(str(path), before.count("\n") + 1, len(before) - before.rfind("\n"))
