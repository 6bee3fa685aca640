"""What a GPU needs now and then, kept in host memory meanwhile: the input embedding, and inputs of recomputed layers.

Of an embedding a step reads the rows of its tokens, so these are all that is sent. The input of a layer that is
recomputed as a whole is read once more, after all layers above it are done: it goes out while its own layer runs, and
comes back while the layer above runs backward. That is 2 bytes a token and hidden unit each way. At the shapes of
Llama 3.1 8B it takes 0.3 us a token at 25 GB/s, and the products of a layer 0.9 us a pass at 500 TFLOP/s: the copy is
over before anybody waits for it. Of the inputs of all layers, two at a time are left on the GPU.
"""

import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from qlora.runtime.phases import Allocation, announce


class HostEmbedding(nn.Module):
    """A frozen embedding in host memory: token ids [...] -> their rows [..., hidden] on `device`.

    It wants the ids on the host too; for others it waits until the device has made them. `weight` [vocabulary, hidden]
    is no parameter, so that a model's parameters are all on one device, as everybody expects.
    """

    weight: Tensor

    def __init__(self, weight: Tensor, device: torch.device) -> None:
        super().__init__()
        object.__setattr__(self, "weight", weight.detach().cpu())
        self.device = device

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...], int64 -> [..., hidden]"""
        with announce(Allocation.HOST):
            shape = ids.numel(), self.weight.shape[1]
            rows = torch.empty(shape, dtype=self.weight.dtype, pin_memory=self.device.type == "cuda")
            torch.index_select(self.weight, 0, ids.cpu().flatten(), out=rows)
        sent = torch.empty(shape, dtype=rows.dtype, device=self.device)
        return sent.copy_(rows, non_blocking=True).view(*ids.shape, -1)


class _Offloaded:
    """The input of one layer: on the device until the next layer begins, and again once the one above runs backward."""

    def __init__(self, tensor: Tensor, below: Callable[[], "_Offloaded | None"]) -> None:
        self._below, self._home = below, tensor.device
        self._device: Tensor | None = None  # while there is no copy yet: the host may have no memory for one
        with announce(Allocation.HOST):
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        self._copied = _copy(self._host, tensor)
        self._device = tensor

    def leave(self) -> None:
        """Give the device's memory back, to what is computed after the copy."""
        if self._device is not None:
            _wait_for(self._copied, self._home)
            self._device = None

    __del__ = leave  # where nobody took it: a copy may be under way

    def come(self) -> None:
        """Begin to be on the device, if it is not."""
        if self._device is None:
            self._device = torch.empty(self._host.shape, dtype=self._host.dtype, device=self._home)
            self._copied = _copy(self._device, self._host)

    def take(self) -> Tensor:
        """The tensor, for the one who asks to own; the input of the layer below begins to come."""
        self.come()
        _wait_for(self._copied, self._home)
        tensor, self._device = self._device, None
        if (below := self._below()) is not None:
            below.come()
        assert tensor is not None
        return tensor


class ActivationOffloader:
    """Where the inputs of a model's recomputed layers lie between the passes; `checkpoint` puts them there."""

    def __init__(self) -> None:
        self._last: Callable[[], _Offloaded | None] = lambda: None
        """the newest, as long as anybody wants it back"""

    def checkpoint(self, layer: Callable[..., Any], hidden: Tensor, *rest: Any) -> Any:
        """torch's checkpoint of `layer(hidden, *rest)`, whose `hidden` is in host memory until the backward."""
        wanted = {hidden.untyped_storage()._cdata}

        def put(tensor: Tensor) -> Tensor | _Offloaded:
            storage = tensor.untyped_storage()._cdata
            if storage not in wanted:
                return tensor
            wanted.remove(storage)  # once, should another argument share it
            return self._put(tensor)

        def take(kept: Tensor | _Offloaded) -> Tensor:
            return kept.take() if isinstance(kept, _Offloaded) else kept

        with saved_tensors_hooks(put, take):
            return checkpoint(layer, hidden, *rest, use_reentrant=False)

    def _put(self, tensor: Tensor) -> _Offloaded:
        below = self._last
        if (before := below()) is not None:
            before.leave()
        shelved = _Offloaded(tensor.detach(), below)
        self._last = weakref.ref(shelved)
        return shelved


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """For copies, beside the one that computes."""
    return torch.cuda.Stream(device)


def _copy(to: Tensor, source: Tensor) -> torch.cuda.Event | None:
    """Begin to copy between host and device, after all that the device has been asked for until now."""
    device = to.device if to.is_cuda else source.device
    if device.type != "cuda":
        to.copy_(source)
        return None
    stream = _stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        to.copy_(source, non_blocking=True)
        return stream.record_event()


def _wait_for(copied: torch.cuda.Event | None, device: torch.device) -> None:
    """What the device is asked for from now on happens after the copy; the host goes on."""
    if copied is not None:
        torch.cuda.current_stream(device).wait_event(copied)
