"""Switching between adapters of one base in memory, without copying or changing a tensor.

Each adapter is kept as a set of adapted layers. Activating an adapter puts its layers in the place of the target
layers; deactivating it puts the target layers back. So adapters can differ in rank, alpha and targets. Without an
active adapter the model is exactly the base.
"""

from pathlib import Path

from torch import nn

from qlora.adapter.adapted_layer import AdaptedLayer
from qlora.adapter.identity import BaseIdentity
from qlora.adapter.store import load_adapter
from qlora.errors import ModelError, UsageError

Place = tuple[nn.Module, str]
"""A parent module and the attribute name of one of its children"""


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
        self._layers: dict[str, list[tuple[Place, AdaptedLayer]]] = {}

    @property
    def names(self) -> list[str]:
        """Names of the loaded adapters, in loading order."""
        return list(self._layers)

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
        if name in self._layers:
            raise UsageError(
                f"an adapter named {name!r} is loaded already: choose another name, or unload that adapter"
            )
        active = self.active
        self.deactivate()
        try:
            load_adapter(self.model, folder, base=base, any_base=any_base)
            self._layers[name] = _places(self.model)
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
        del self._layers[name]

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
            for (parent, attribute), layer in self._layers[name]:
                if layer.training != layer.base.training:  # the model's mode changed while the layer was out
                    layer.train(layer.base.training)
                setattr(parent, attribute, layer)
        self.active = name

    def deactivate(self) -> None:
        """Make the model compute the base alone."""
        self.activate(None)

    def _put_back(self, name: str) -> None:
        for (parent, attribute), layer in self._layers[name]:
            setattr(parent, attribute, layer.base)

    def _check(self, name: str) -> None:
        if name not in self._layers:
            have = ", ".join(self._layers) or "none"
            raise UsageError(f"no adapter is named {name!r}; loaded: {have}")


def _places(model: nn.Module) -> list[tuple[Place, AdaptedLayer]]:
    """Return every place of an AdaptedLayer in the model; a shared layer has several places."""
    return [
        ((parent, attribute), child)
        for parent in model.modules()
        for attribute, child in parent._modules.items()
        if isinstance(child, AdaptedLayer)
    ]
