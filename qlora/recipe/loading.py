"""Finding a recipe and reading its file."""

import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora.errors import RecipeError
from qlora.recipe import shipped
from qlora.recipe.checking import check
from qlora.recipe.overrides import override
from qlora.recipe.problems import FORBIDDEN, Document, Place, shorten
from qlora.recipe.reading import read
from qlora.recipe.schema import Recipe

MAX_BYTES = 64 * 1024  # the longest shipped recipe is 1 KiB; parsing takes time in proportion


def load(name_or_path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and check a recipe; raises `RecipeError` with one line a problem."""
    path = locate(name_or_path)
    document = read(_text(path), str(path))
    if document.value is None:
        document.value = {}
    for argument in overrides:
        override(document, argument)
    return check(document, path.stem)


def from_dict(settings: Mapping[str, Any], name: str) -> Recipe:
    """Check nested dictionaries as if they were a recipe file called `name`."""
    return check(Document(name, _plain(settings)), name)


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
