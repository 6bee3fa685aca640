"""Switching between adapters of one base in memory, without copying or changing a tensor.

Each adapter is kept as a set of adapted layers, with the modules and token rows that were trained beside it. Activating
an adapter puts them in the place of the base's modules; deactivating it puts these back. So adapters can differ in
rank, alpha, targets and tokens. Without an active adapter the model is exactly the base. If PiSSA took its initial
update out of the base, layers with that update are then in the place of the target layers.
"""

from pathlib import Path
from typing import NamedTuple

from torch import nn

from qlora.adapter.adapted_layer import AdaptedLayer
from qlora.adapter.identity import BaseIdentity
from qlora.adapter.initial import InitialValues
from qlora.adapter.peft_tensors import SUFFIX_A, SUFFIX_B
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


class Loaded(NamedTuple):
    """An adapter in memory."""

    changes: list[Change]
    initial: InitialValues | None
    """its A and B before the first step, if they came from the base's weights"""


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
        self._loaded: dict[str, Loaded] = {}
        self._base = Loaded([], InitialValues.of(model))
        """what the model shows without an active adapter"""

    @property
    def names(self) -> list[str]:
        """Names of the loaded adapters, in loading order."""
        return list(self._loaded)

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
        if name in self._loaded:
            raise UsageError(
                f"an adapter named {name!r} is loaded already: choose another name, or unload that adapter"
            )
        _require_prepared(self.model, folder)
        self._hide()
        try:
            use_nf4_linears(self.model)
            before = _children(self.model)
            load_adapter(self.model, folder, base=base, any_base=any_base)
            after = _children(self.model)
            changes = [
                Change(place, child, after[place])
                for place, child in before.items()
                if place in after and after[place] is not child
            ]
            self._loaded[name] = Loaded(changes, InitialValues.of(self.model))
            if not self._base.changes:
                self._base = self._base._replace(changes=_at_start(self.model, changes))
            _put_back(changes)
        finally:
            self._show()

    def unload(self, name: str) -> None:
        """Drop a loaded adapter, deactivating it first if it is active.

        Raises:
            UsageError: no adapter has that name.
        """
        self._check(name)
        if name == self.active:
            self.deactivate()
        del self._loaded[name]

    def activate(self, name: str | None) -> None:
        """Make the model compute the base plus the adapter `name`.

        Args:
            name: a loaded adapter; None means the base alone.

        Raises:
            UsageError: no adapter has that name; nothing has changed.
        """
        if name is not None:
            self._check(name)
        self._hide()
        self.active = name
        self._show()

    def deactivate(self) -> None:
        """Make the model compute the base alone."""
        self.activate(None)

    @property
    def _shown(self) -> Loaded:
        return self._base if self.active is None else self._loaded[self.active]

    def _show(self) -> None:
        _put_in(self._shown.changes)
        self.model.initial_values = self._shown.initial  # type: ignore[assignment]

    def _hide(self) -> None:
        _put_back(self._shown.changes)

    def _check(self, name: str) -> None:
        if name not in self._loaded:
            have = ", ".join(self._loaded) or "none"
            raise UsageError(f"no adapter is named {name!r}; loaded: {have}")


def _put_in(changes: list[Change]) -> None:
    """Put modules into their places."""
    for (parent, attribute), base, module in changes:
        if module.training != base.training:  # the model's mode changed while the module was out
            module.train(base.training)
        setattr(parent, attribute, module)


def _put_back(changes: list[Change]) -> None:
    """Put the base's modules back into their places."""
    for (parent, attribute), base, _ in changes:
        setattr(parent, attribute, base)


def _at_start(model: nn.Module, changes: list[Change]) -> list[Change]:
    """Return changes to layers with the initial update that was taken out of the base; empty if none was."""
    values = InitialValues.of(model)
    if values is None or values.changed is None:
        return []
    layers: dict[nn.Module, AdaptedLayer] = {}
    for name, layer in AdaptedLayer.of(model).items():
        initial, twin = values.layers[name], type(layer)(layer.base, layer.spec)
        twin.number = layer.number
        for suffix, tensor in ((SUFFIX_A, initial.a), (SUFFIX_B, initial.b)):
            like = layer.saved()[suffix]
            setattr(twin, twin.SAVED[suffix], nn.Parameter(tensor.to(like), requires_grad=False))
        layers[layer] = twin
    return [change._replace(module=layers[change.module]) for change in changes if change.module in layers]


def _require_prepared(model: nn.Module, folder: str | Path) -> None:
    """Raise ModelError if the adapter in `folder` would change the base, which the other adapters share."""
    values = InitialValues.stored(Path(folder))
    if values is not None and values.changed not in (None, BaseIdentity.of(model).changed):
        raise ModelError(
            f"{folder}: the adapter was trained on a base that {values.spec.init} changed, and this one is unchanged. "
            f"Convert the adapter: qlora adapter export {folder} --to DIR"
        )


def _children(model: nn.Module) -> dict[Place, nn.Module]:
    """Return every module of the model by its places; a shared module has several."""
    return {
        (parent, attribute): child
        for parent in model.modules()
        for attribute, child in parent._modules.items()
        if child is not None
    }
