"""Marks in a trace of memory at the borders of decoder layers."""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qlora.memory.live import LiveBytes
from qlora.model.checkpointing import decoder_layers
from qlora.runtime.phases import Phase

Call = tuple[int, Hashable]
"""number of a decoder layer, and the shapes of the tensors that it is given"""


@contextmanager
def layers_marked(model: nn.Module, live: LiveBytes) -> Iterator[list[Call]]:
    """Mark in the trace of `live` where the passes enter and leave each decoder layer of `model`.

    Yields:
        The calls of the layers in the forward pass, in their order.
    """
    calls: list[Call] = []

    def enter(number: int, module: nn.Module, args: Any, kwargs: Any) -> None:
        if live.clock.phase != Phase.BACKWARD:  # in the backward pass a checkpointed layer runs forward again
            given = [one.shape for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
            calls.append((number, tuple(given)))
            live.clock.mark(number)

    def leave(number: int, module: nn.Module, args: Any, output: Any) -> None:
        if live.clock.phase == Phase.BACKWARD:
            return
        # A layer frees its local tensors only after this hook, so the layer's segment ends where the next layer begins
        if number == last:
            live.clock.mark()
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(lambda _: live.clock.mark(number))

    handles = []
    layers = decoder_layers(model)
    last = len(layers) - 1
    for number, layer in enumerate(layers):
        handles.append(layer.register_forward_pre_hook(partial(enter, number), with_kwargs=True))
        handles.append(layer.register_forward_hook(partial(leave, number)))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def alike(calls: Sequence[Call], kinds: Sequence[Hashable]) -> bool:
    """Return True if each layer ran once, and layers of a kind were given tensors of the same shapes.

    Not so if layers run in a loop, or hand on what grows from layer to layer, such as Inkling 2's states of blocks.

    Args:
        calls: the layers' calls in a forward pass.
        kinds: the kind of each layer.
    """
    given = dict(calls)
    shapes = {(kinds[number], one) for number, one in given.items()}
    return len(calls) == len(given) and len(shapes) == len(set(kinds))
