"""Switching between adapters of one base in memory, without copying or changing a tensor.

Each adapter is kept as a set of adapted layers. Activating an adapter puts its layers in the place of the target
layers; deactivating it puts the target layers back. So adapters can differ in rank, alpha and targets. Without an
active adapter the model is exactly the base. If PiSSA took its initial update out of the base, layers with that update
are then in the place of the target layers.
"""

from pathlib import Path

from torch import nn

from qlora.adapter.adapted_layer import AdaptedLayer
from qlora.adapter.identity import BaseIdentity
from qlora.adapter.initial import InitialValues
from qlora.adapter.peft_tensors import SUFFIX_A, SUFFIX_B
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
        self._base: list[tuple[Place, AdaptedLayer]] = []

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
        _require_prepared(self.model, folder)
        _put_back(self._shown)
        try:
            load_adapter(self.model, folder, base=base, any_base=any_base)
            self._layers[name] = _places(self.model)
            self._base = self._base or _at_start(self.model)
            _put_back(self._layers[name])
        finally:
            _put_in(self._shown)

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
        _put_back(self._shown)
        self.active = name
        _put_in(self._shown)

    def deactivate(self) -> None:
        """Make the model compute the base alone."""
        self.activate(None)

    @property
    def _shown(self) -> list[tuple[Place, AdaptedLayer]]:
        return self._base if self.active is None else self._layers[self.active]

    def _check(self, name: str) -> None:
        if name not in self._layers:
            have = ", ".join(self._layers) or "none"
            raise UsageError(f"no adapter is named {name!r}; loaded: {have}")


def _put_in(layers: list[tuple[Place, AdaptedLayer]]) -> None:
    """Put adapted layers into their places."""
    for (parent, attribute), layer in layers:
        if layer.training != layer.base.training:  # the model's mode changed while the layer was out
            layer.train(layer.base.training)
        setattr(parent, attribute, layer)


def _put_back(layers: list[tuple[Place, AdaptedLayer]]) -> None:
    """Put the bases of adapted layers back into their places."""
    for (parent, attribute), layer in layers:
        setattr(parent, attribute, layer.base)


def _at_start(model: nn.Module) -> list[tuple[Place, AdaptedLayer]]:
    """Return layers with the initial update that was taken out of the base, by place; empty if none was."""
    values = InitialValues.of(model)
    if values is None or values.changed is None:
        return []
    layers = {}
    for name, layer in AdaptedLayer.of(model).items():
        initial, twin = values.layers[name], type(layer)(layer.base, layer.spec)
        twin.number = layer.number
        for suffix, tensor in ((SUFFIX_A, initial.a), (SUFFIX_B, initial.b)):
            like = layer.saved()[suffix]
            setattr(twin, twin.SAVED[suffix], nn.Parameter(tensor.to(like), requires_grad=False))
        layers[layer] = twin
    return [(place, layers[layer]) for place, layer in _places(model)]


def _require_prepared(model: nn.Module, folder: str | Path) -> None:
    """Raise ModelError if the adapter in `folder` would change the base, which the other adapters share."""
    values = InitialValues.stored(Path(folder))
    if values is not None and values.changed not in (None, BaseIdentity.of(model).changed):
        raise ModelError(
            f"{folder}: the adapter was trained on a base that {values.spec.init} changed, and this one is unchanged. "
            f"Convert the adapter: qlora adapter export {folder} --to DIR"
        )


def _places(model: nn.Module) -> list[tuple[Place, AdaptedLayer]]:
    """Return every place of an AdaptedLayer in the model; a shared layer has several places."""
    return [
        ((parent, attribute), child)
        for parent in model.modules()
        for attribute, child in parent._modules.items()
        if isinstance(child, AdaptedLayer)
    ]
