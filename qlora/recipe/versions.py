"""Versions of the recipe keys, and the translation of old keys to new ones.

A recipe that qlora writes begins with its version; version 1 had no such key. Recipes and plans of earlier runs are
translated when they are read. An old key in a recipe written by hand is an error that names the new key and value.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from qlora.errors import RecipeError
from qlora.recipe.problems import Document, KeyPath

VERSION = 2

EVERY_LAYER = 10_000
"""more layers than any model has: all MLPs"""


class NewerRecipe(RecipeError):
    """The recipe has a version that this release does not know."""


@dataclass(frozen=True)
class Change:
    """Old keys of a section, and the new key that replaced them."""

    until: int
    """the last version with the old keys"""
    section: str
    old: tuple[str, ...]
    new: str
    convert: Callable[..., Any]
    """(values of the old keys, None if missing) -> value of the new key, None if an old value is wrong"""

    def value(self, section: Mapping[str, Any]) -> Any:
        """Return the value of the new key; None if the section has none of the old keys, or wrong values."""
        if section.keys().isdisjoint(self.old):
            return None
        return self.convert(*(section.get(key) for key in self.old))


def _checkpointing(layers: Any, mlps: Any) -> Any:
    """Convert two keys: each was a boolean (all layers or none) or a number of layers; MLPs came after `layers`."""
    if layers is None:
        layers = not mlps  # the default was all layers, unless MLPs were set
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
    """Return a conversion that keeps these values and rejects all others."""
    return lambda value: value if isinstance(value, type(values[0])) and value in values else None


CHANGES = (
    Change(1, "training", ("gradient_checkpointing", "mlp_checkpointing"), "activation_checkpointing", _checkpointing),
    Change(1, "training", ("offload",), "activation_offloading", _one_of(True, False)),
    Change(1, "data", ("loss_on",), "train_on", _one_of("completion", "all")),
)  # fmt: skip


def change_of(path: KeyPath) -> Change | None:
    """Return the change that removed this key; None if no version had it."""
    return next((change for change in CHANGES if path in [(change.section, key) for key in change.old]), None)


def translated(name: str, section: Mapping[str, Any], version: int = 1) -> dict[str, Any]:
    """Return the settings of the section `name`, written by `version`, with the present keys."""
    settings = dict(section)
    for change in CHANGES:
        applies = change.section == name and version <= change.until and change.new not in settings
        if applies and (value := change.value(settings)) is not None:
            settings = {key: old for key, old in settings.items() if key not in change.old}
            settings[change.new] = value
    return settings


def translate(document: Document, *, recorded: bool) -> None:
    """Translate the keys of an earlier version, in place.

    Args:
        document: the recipe.
        recorded: True for a recipe of a run or an adapter, which has version 1 if it states none. A recipe written by
            hand has the present version then.

    Raises:
        NewerRecipe: this release does not know the recipe's version.
    """
    settings = document.value
    if not isinstance(settings, dict):
        return
    version = settings.get("version", 1 if recorded else VERSION)
    if type(version) is not int or version < 1:
        return  # the schema rejects it
    if version > VERSION:
        raise NewerRecipe(
            f"{document.place(('version',))}: version: {version} was written by a newer qlora, and this one reads "
            f"versions up to {VERSION}; update qlora"
        )
    if recorded or version > 1:  # qlora never wrote `version: 1`, so such a recipe is written by hand
        settings |= {
            name: translated(name, section, version)
            for name, section in settings.items()
            if isinstance(section, dict)
        }
    if "version" in settings:
        settings["version"] = VERSION
