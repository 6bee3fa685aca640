"""Switching between adapters of one base in memory, without copying or changing a tensor.

Each adapter is kept as a set of adapted layers, with the modules and token rows that were trained beside it. Activating
an adapter puts them in the place of the base's modules; deactivating it puts these back. So adapters can differ in
rank, alpha, targets and tokens. Without an active adapter the model is exactly the base.
"""

from pathlib import Path
from typing import NamedTuple

from torch import nn

from qlora.adapter.adapted_layer import AdaptedLayer
from qlora.adapter.identity import BaseIdentity
from qlora.adapter.store import load_adapter
from qlora.errors import ModelError, UsageError
from qlora.quantization.nf4 import use_nf4_linears

Place = tuple[nn.Module, str]
"""A parent module and the attribute name of one of its children"""


class Change(NamedTuple):
    """A module that an adapter puts in the place of one of the base's."""

    place: Place
    base: nn.Module
    module: nn.Module


class Adapters:
    """Several adapters of one model, at most one of them active.

    Args:
        model: a base without an adapter, already on its final device. Loading an adapter freezes the model.

    Raises:
        ModelError: the model has an adapter already.

    Examples:
        >>> adapters = Adapters(load_base(recipe.base))
        >>> adapters.load("poet", "runs/poet/adapter")
        >>> adapters.load("clerk", "runs/clerk/adapter")
        >>> adapters.activate("poet")
        >>> adapters.deactivate()
    """

    def __init__(self, model: nn.Module) -> None:
        if AdaptedLayer.of(model):
            raise ModelError(
                "the model is adapted already: pass the base without an adapter, then load the adapters by name"
            )
        self.model = model
        self.active: str | None = None
        """name of the active adapter; None if the model computes the base alone"""
        self._changes: dict[str, list[Change]] = {}

    @property
    def names(self) -> list[str]:
        """Names of the loaded adapters, in loading order."""
        return list(self._changes)

    def load(
        self, name: str, folder: str | Path, *, base: BaseIdentity | None = None, any_base: bool = False
    ) -> None:
        """Load the adapter in `folder` under `name`, without changing which adapter is active.

        Args:
            name: name for `activate` and `unload`.
            folder: an adapter folder, written by qlora or PEFT.
            base: fingerprint of the model; None reads it from the model.
            any_base: load the adapter even if it was trained on another base.

        Raises:
            UsageError: the name is taken; nothing has changed.
            ModelError: the adapter does not fit the model or was trained on another base; nothing has changed.
        """
        if name in self._changes:
            raise UsageError(
                f"an adapter named {name!r} is loaded already: choose another name, or unload that adapter"
            )
        active = self.active
        self.deactivate()
        try:
            use_nf4_linears(self.model)
            before = _children(self.model)
            load_adapter(self.model, folder, base=base, any_base=any_base)
            after = _children(self.model)
            self._changes[name] = [
                Change(place, child, after[place])
                for place, child in before.items()
                if place in after and after[place] is not child
            ]
            self._put_back(name)
        finally:
            self.activate(active)

    def unload(self, name: str) -> None:
        """Drop a loaded adapter, deactivating it first if it is active.

        Raises:
            UsageError: no adapter has that name.
        """
        self._check(name)
        if name == self.active:
            self.deactivate()
        del self._changes[name]

    def activate(self, name: str | None) -> None:
        """Make the model compute the base plus the adapter `name`.

        Args:
            name: a loaded adapter; None means the base alone.

        Raises:
            UsageError: no adapter has that name; nothing has changed.
        """
        if name is not None:
            self._check(name)
        if self.active is not None:
            self._put_back(self.active)
        if name is not None:
            for (parent, attribute), base, module in self._changes[name]:
                if module.training != base.training:  # the model's mode changed while the module was out
                    module.train(base.training)
                setattr(parent, attribute, module)
        self.active = name

    def deactivate(self) -> None:
        """Make the model compute the base alone."""
        self.activate(None)

    def _put_back(self, name: str) -> None:
        for (parent, attribute), base, _ in self._changes[name]:
            setattr(parent, attribute, base)

    def _check(self, name: str) -> None:
        if name not in self._changes:
            have = ", ".join(self._changes) or "none"
            raise UsageError(f"no adapter is named {name!r}; loaded: {have}")


def _children(model: nn.Module) -> dict[Place, nn.Module]:
    """Return every module of the model by its places; a shared module has several."""
    return {
        (parent, attribute): child
        for parent in model.modules()
        for attribute, child in parent._modules.items()
        if child is not None
    }
