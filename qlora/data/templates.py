"""Chat templates by name, and from files."""

import io
from importlib.resources import files
from pathlib import Path

from qlora.errors import DataError
from qlora.storage import regular_file

_FOLDER = files("qlora.data") / "chat_templates"

NAMED = tuple(sorted(file.name.removesuffix(".jinja") for file in _FOLDER.iterdir()))
"""Templates that ship with qlora: the names of the files in chat_templates/."""

OWN = "tokenizer"
"""Value of `data.template` for the tokenizer's own chat template."""


def template_text(name: str) -> str:
    """Return the jinja source of a named template or of a .jinja file.

    Raises:
        DataError: No template has this name, or the file cannot be read.
    """
    if name in NAMED:
        return (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    path = Path(name).expanduser()
    if path.suffix not in (".jinja", ".jinja2", ".j2"):
        raise DataError(
            f"data.template: {name!r} is not a template; set it to {', '.join(NAMED)} or the path of a .jinja file"
        )
    try:
        with io.TextIOWrapper(regular_file.opened(path), encoding="utf-8") as file:
            return file.read()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DataError(f"data.template: {name!r} cannot be read: {reason}") from error
