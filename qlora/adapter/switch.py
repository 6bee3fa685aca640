"""One base in memory, many adapters beside it: a switch changes which modules the model calls, and no byte.

An adapter is kept as the adapted layers that it needs. To activate it is to put these where its targets stand; to
deactivate it, to put the targets back. So adapters may differ in rank, alpha and targets, and the base, when
none is active, is the very model it was before.
"""

from pathlib import Path

from torch import nn

from qlora.adapter.adapted_linear import AdaptedLinear
from qlora.adapter.identity import BaseIdentity
from qlora.adapter.store import load_adapter
from qlora.errors import ModelError, UsageError

Place = tuple[nn.Module, str]
"""A parent and the name under which it holds a child"""


class Adapters:
    """The adapters of one model, of which at most one is active.

        >>> adapters = Adapters(load_base(recipe.base))
        >>> adapters.load("poet", "runs/poet/adapter")
        >>> adapters.load("clerk", "runs/clerk/adapter")
        >>> adapters.activate("poet")
        >>> adapters.deactivate()

    model: a base without an adapter, on the device where it stays; it is frozen. Raises ModelError if it is
    adapted already.
    """

    def __init__(self, model: nn.Module) -> None:
        if AdaptedLinear.of(model):
            raise ModelError(
                "the model is adapted already: give the base alone, and load its adapters by name"
            )
        self.model = model
        self.active: str | None = None
        """name of the active adapter"""
        self._layers: dict[str, list[tuple[Place, AdaptedLinear]]] = {}

    @property
    def names(self) -> list[str]:
        """Of the adapters that are loaded, in the order in which they were."""
        return list(self._layers)

    def load(
        self, name: str, folder: str | Path, *, base: BaseIdentity | None = None, any_base: bool = False
    ) -> None:
        """Read the adapter in `folder` and keep it as `name`; which one is active stays as it is.

        base, any_base: see `load_adapter`. Raises UsageError, and changes nothing, if the name is taken; ModelError if
        the adapter does not fit the model or was trained on another one.
        """
        if name in self._layers:
            raise UsageError(
                f"an adapter named {name!r} is loaded already: choose another name, or unload it"
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
        """Forget an adapter; an active one is deactivated first. Raises UsageError if there is none of that name."""
        self._check(name)
        if name == self.active:
            self.deactivate()
        del self._layers[name]

    def activate(self, name: str | None) -> None:
        """Make the model compute base + adapter `name`; None is the base alone.

        Raises UsageError, and changes nothing, if there is no adapter of that name.
        """
        if name is not None:
            self._check(name)
        if self.active is not None:
            self._put_back(self.active)
        if name is not None:
            for (parent, attribute), layer in self._layers[name]:
                if layer.training != layer.base.training:  # it was not there when the model's mode was set
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


def _places(model: nn.Module) -> list[tuple[Place, AdaptedLinear]]:
    """Every place where an AdaptedLinear stands; a shared one stands in several."""
    return [
        ((parent, attribute), child)
        for parent in model.modules()
        for attribute, child in parent._modules.items()
        if isinstance(child, AdaptedLinear)
    ]
