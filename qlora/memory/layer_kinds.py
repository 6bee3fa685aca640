"""Kinds of decoder layers, and configurations of a model with some of its layers only."""

import copy
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from qlora.model.checkpointing import decoder_layers

Shape = tuple[Any, ...]


class Shapes(NamedTuple):
    """Names, shapes and settings of a model, layer by layer: its memory depends on nothing else."""

    layers: tuple[Shape, ...]
    """one a decoder layer; equal for layers of a kind"""
    rest: Shape
    """all outside the decoder layers"""

    def kinds(self) -> tuple[int, ...]:
        """Return the number of each layer's kind."""
        numbers = {layer: number for number, layer in enumerate(dict.fromkeys(self.layers))}
        return tuple(numbers[layer] for layer in self.layers)

    def of(self, layers: Sequence[int]) -> "Shapes":
        """Return the shapes of a model with some of the layers only."""
        return Shapes(tuple(self.layers[layer] for layer in layers), self.rest)

    def with_adapter(self, model: nn.Module) -> "Shapes":
        """Add the parameters of the same model with its adapter and our layers."""
        added = Shapes(*_tensors(model))
        pairs = tuple(zip(self.layers, added.layers, strict=True))
        return Shapes(pairs, (self.rest, added.rest))


def shapes(model: nn.Module, config: Any, quantized: Collection[str]) -> Shapes:
    """Return the shapes of a model before it has an adapter.

    The layers are of different kinds each if the model is not one list of layers that run one after the other.

    Args:
        model: the model.
        config: its configuration.
        quantized: names of the layers that loading quantizes.
    """
    layers = decoder_layers(model)
    lists = _lists(config, len(layers))
    names = {module: name for name, module in model.named_modules()}
    listed = len({names[layer].rpartition(".")[0] for layer in layers}) == 1
    # HRM and others count more layers than there are: some run several times
    once = (getattr(config.get_text_config(), "num_hidden_layers", None) or 0) <= len(layers)
    settings = _settings(layers)
    looks = []
    for number, layer in enumerate(layers):
        prefix = f"{names[layer]}."
        packed = frozenset(name.removeprefix(prefix) for name in quantized if name.startswith(prefix))
        own = tuple(values[number] for values in lists.values())
        looks.append((None if listed and once else number, packed, settings[number], own))
    tensors, rest = _tensors(model)
    return Shapes(tuple(zip(looks, tensors, strict=True)), rest)


def shortened(config: Any, layers: Sequence[int]) -> Any:
    """Return a copy of the configuration with only some of its layers, by number.

    A configuration can also describe its layers by rules, such as every fourth or the first three. So the layers of the
    copy need not be these: compare the `shapes`.
    """
    config = copy.deepcopy(config)
    text = config.get_text_config()
    count = getattr(text, "num_hidden_layers", 0)
    if len(layers) < count:
        for name, values in _lists(config, count).items():
            setattr(text, name, [values[layer] for layer in layers])
        text.num_hidden_layers = len(layers)
    return config


def _lists(config: Any, count: int) -> dict[str, Sequence[Any]]:
    """Return the attributes of a configuration with a word or a flag for each of `count` layers."""
    return {
        name: values
        for name, values in vars(config.get_text_config()).items()
        if isinstance(values, list | tuple)
        and len(values) == count
        and all(isinstance(value, str | bool) or value in (0, 1) for value in values)
    }


def _settings(layers: Sequence[nn.Module]) -> list[Shape]:
    """Return for each layer the class and the plain attributes of its modules, without those that number the layers."""
    found = [dict(_attributes(layer)) for layer in layers]
    offsets: dict[str, set[int]] = {}
    for number, one in enumerate(found):
        for name, value in one.items():
            counted = type(value) is int
            offsets.setdefault(name, set()).add(value - number if counted else -1)
    numbering = {name for name, values in offsets.items() if len(values) == 1 and values <= {0, 1}}
    return [tuple(item for item in one.items() if item[0] not in numbering) for one in found]


def _attributes(layer: nn.Module) -> Iterator[tuple[str, Any]]:
    for path, module in layer.named_modules():
        yield path, type(module).__name__
        for name, value in vars(module).items():
            if isinstance(value, float):
                yield f"{path}.{name}", value != 0  # a factor of 0 can leave out a step, as dropout's does
            elif isinstance(value, int | str | None):
                yield f"{path}.{name}", value


def _tensors(model: nn.Module) -> tuple[tuple[Shape, ...], Shape]:
    """Return name, shape, dtype and gradient of all tensors, by layer, and of those outside the layers."""

    def looks(named: Iterator[tuple[str, Tensor]]) -> Shape:
        return tuple((name, one.shape, one.dtype, one.requires_grad) for name, one in named)

    layers = decoder_layers(model)
    inside = {id(one) for layer in layers for one in (*layer.parameters(), *layer.buffers())}
    outside = (
        (name, one)
        for named in (model.named_parameters(), model.named_buffers())
        for name, one in named
        if id(one) not in inside
    )
    return tuple((looks(layer.named_parameters()), looks(layer.named_buffers())) for layer in layers), looks(
        outside
    )
