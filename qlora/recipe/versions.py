"""Versions of the recipe: which key took the place of which.

A recipe that we write begins with its version; version 1 did not state it. Recipes and plans that a run left are
translated when they are read. A person who writes an old key is told the new one and the value to write.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from qlora.errors import RecipeError
from qlora.recipe.problems import Document, KeyPath

VERSION = 2

EVERY_LAYER = 10_000
"""more layers than any model has"""


class NewerRecipe(RecipeError):
    """A recipe of a version that this release does not know."""


@dataclass(frozen=True)
class Change:
    """Keys of a section, and the one that took their place."""

    until: int
    """the last version with the old keys"""
    section: str
    old: tuple[str, ...]
    new: str
    convert: Callable[..., Any]
    """from the values of the old keys (None where one is missing) to the new one; None where a value is wrong"""

    def value(self, section: Mapping[str, Any]) -> Any:
        """The value for the new key; None if the section has no old one, or wrong values."""
        if section.keys().isdisjoint(self.old):
            return None
        return self.convert(*(section.get(key) for key in self.old))


def _checkpointing(layers: Any, mlps: Any) -> Any:
    """Each was a boolean, for all layers or none, or a number of layers; the MLPs were of the layers after those."""
    if layers is None:
        layers = not mlps  # the default was all layers, which left no MLPs
    mlps = mlps or False
    if not all(isinstance(count, int) and count >= 0 for count in (layers, mlps)):
        return None
    if layers is True:
        return "full"
    if mlps is True and not layers:
        return "mlp"
    if not (layers or mlps):
        return "none"
    return {"full": int(layers), "mlp": EVERY_LAYER if mlps is True else int(mlps)}


def _one_of(*values: Any) -> Callable[[Any], Any]:
    """A new key takes the values of the old one."""
    return lambda value: value if isinstance(value, type(values[0])) and value in values else None


CHANGES = (
    Change(1, "training", ("gradient_checkpointing", "mlp_checkpointing"), "activation_checkpointing", _checkpointing),
    Change(1, "training", ("offload",), "activation_offloading", _one_of(True, False)),
    Change(1, "data", ("loss_on",), "train_on", _one_of("completion", "all")),
)  # fmt: skip


def change_of(path: KeyPath) -> Change | None:
    """The change that took this key away; None if no version had it."""
    return next((change for change in CHANGES if path in [(change.section, key) for key in change.old]), None)


def translated(name: str, section: Mapping[str, Any], version: int = 1) -> dict[str, Any]:
    """The settings of the section called `name`, as `version` wrote them, with the keys of today."""
    settings = dict(section)
    for change in CHANGES:
        applies = change.section == name and version <= change.until and change.new not in settings
        if applies and (value := change.value(settings)) is not None:
            settings = {key: old for key, old in settings.items() if key not in change.old}
            settings[change.new] = value
    return settings


def translate(document: Document, *, recorded: bool) -> None:
    """Give a recipe of an earlier version the keys of today, in place.

    Args:
        recorded: it lies among results. Where it states no version it is of version 1 then; a person's recipe is of
            today's.

    Raises:
        NewerRecipe: it is of a version that this release does not know.
    """
    settings = document.value
    if not isinstance(settings, dict):
        return
    version = settings.get("version", 1 if recorded else VERSION)
    if type(version) is not int or version < 1:
        return  # the schema refuses it
    if version > VERSION:
        raise NewerRecipe(
            f"{document.place(('version',))}: version: {version} is of a newer qlora, and this one reads recipes up "
            f"to version {VERSION}; update qlora"
        )
    if recorded or version > 1:  # version 1 was never written: there it is a person's
        settings |= {
            name: translated(name, section, version)
            for name, section in settings.items()
            if isinstance(section, dict)
        }
    if "version" in settings:
        settings["version"] = VERSION
