"""Finds the files of a base: a hub id, a local folder, or a file of the package."""

from pathlib import Path

from qlora import bundled
from qlora.errors import ModelError
from qlora.model.known_architectures import KNOWN_ARCHITECTURES
from qlora.recipe import Base


def locate(base: Base) -> str:
    """Return the location of the model for transformers: a hub id, a local folder, or a config file of the package."""
    name = base.model
    if name.startswith("bundled/"):
        return str(bundled.path(name))
    if base.init != "pretrained" and name in KNOWN_ARCHITECTURES and not Path(name).exists():
        return str(bundled.path(f"bundled/configs/{KNOWN_ARCHITECTURES[name]}.json"))
    if Path(name).exists():
        return name
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(
            f"base.model: there is no folder {name!r}. Use a local folder, a hub id or bundled/base"
        )
    return name
