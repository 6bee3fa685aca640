"""Marks in a trace of memory at the borders of decoder layers."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from qlora.memory.live import LiveBytes
from qlora.model.checkpointing import decoder_layers
from qlora.runtime.phases import Phase


@contextmanager
def layers_marked(model: nn.Module, live: LiveBytes) -> Iterator[None]:
    """Mark in the trace of `live` where the passes enter and leave each decoder layer of `model`."""

    def enter(number: int, module: nn.Module, args: Any) -> None:
        if live.clock.phase != Phase.BACKWARD:  # in the backward pass a checkpointed layer runs forward again
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
        handles.append(layer.register_forward_pre_hook(partial(enter, number)))
        handles.append(layer.register_forward_hook(partial(leave, number)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
