"""CPU offload of the input embedding and of checkpointed layer inputs.

A step reads only the embedding rows of its tokens, so only these rows are copied to the GPU. The input of a
checkpointed layer is needed again after the backward pass of all layers above. It is copied to the host while its own
layer runs forward, and back while the layer above runs backward: 2 bytes per token and hidden unit in each direction.
At the shapes of Llama 3.1 8B this takes 0.3 us per token at 25 GB/s. The matrix products of a layer take 0.9 us per
token and pass at 500 TFLOP/s, so the copy finishes before it is needed. At most two layer inputs are on the GPU at a
time.
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
    """A frozen embedding in host memory that returns its rows on a GPU.

    Token ids should be on the host too; for ids on the GPU, the host waits until they are computed. `weight` is not a
    parameter, because other code expects all parameters of a model on one device.

    Args:
        weight: [vocabulary, hidden].
        device: device of the returned rows.
    """

    weight: Tensor
    looks_up_rows = True
    """so that single rows can be trained on the device, beside it"""

    def __init__(self, weight: Tensor, device: torch.device) -> None:
        super().__init__()
        object.__setattr__(self, "weight", weight.detach().cpu())
        self.device = device

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows [..., hidden] of ids [...] (int64), on `device`."""
        with announce(Allocation.HOST):
            shape = ids.numel(), self.weight.shape[1]
            rows = torch.empty(shape, dtype=self.weight.dtype, pin_memory=self.device.type == "cuda")
            torch.index_select(self.weight, 0, ids.cpu().flatten(), out=rows)
        sent = torch.empty(shape, dtype=rows.dtype, device=self.device)
        return sent.copy_(rows, non_blocking=True).view(*ids.shape, -1)


class _Offloaded:
    """Input of one layer, off the device from the next layer's forward pass until that layer's backward pass."""

    def __init__(self, tensor: Tensor, below: Callable[[], "_Offloaded | None"]) -> None:
        self._below, self._home = below, tensor.device
        self._device: Tensor | None = (
            None  # set only after the copy has begun: allocating host memory can fail
        )
        with announce(Allocation.HOST):
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        self._copied = _copy(self._host, tensor)
        self._device = tensor

    def leave(self) -> None:
        """Free the device's memory for computations after the copy."""
        if self._device is not None:
            _wait_for(self._copied, self._home)
            self._device = None

    __del__ = leave  # if the tensor was never taken, a copy can still be running

    def come(self) -> None:
        """Start the copy back to the device, unless the tensor is there already."""
        if self._device is None:
            self._device = torch.empty(self._host.shape, dtype=self._host.dtype, device=self._home)
            self._copied = _copy(self._device, self._host)

    def take(self) -> Tensor:
        """Return the tensor and drop our reference to it; start the copy back of the layer below's input."""
        self.come()
        _wait_for(self._copied, self._home)
        tensor, self._device = self._device, None
        if (below := self._below()) is not None:
            below.come()
        assert tensor is not None
        return tensor


class ActivationOffloader:
    """Host memory for the inputs of a model's checkpointed layers between forward and backward pass."""

    def __init__(self) -> None:
        self._last: Callable[[], _Offloaded | None] = lambda: None
        """weak reference to the input that was offloaded last"""

    def checkpoint(self, layer: Callable[..., Any], hidden: Tensor, *rest: Any) -> Any:
        """Run `layer(hidden, *rest)` like torch.utils.checkpoint, with `hidden` in host memory until the backward."""
        offloaded = {hidden.untyped_storage()._cdata}

        def put(tensor: Tensor) -> Tensor | _Offloaded:
            storage = tensor.untyped_storage()._cdata
            if storage not in offloaded:
                return tensor
            offloaded.remove(storage)  # only once, even if another argument shares the storage
            return self._put(tensor)

        def take(saved: Tensor | _Offloaded) -> Tensor:
            return saved.take() if isinstance(saved, _Offloaded) else saved

        with saved_tensors_hooks(put, take):
            return checkpoint(layer, hidden, *rest, use_reentrant=False)

    def _put(self, tensor: Tensor) -> _Offloaded:
        below = self._last
        if (previous := below()) is not None:
            previous.leave()
        offloaded = _Offloaded(tensor.detach(), below)
        self._last = weakref.ref(offloaded)
        return offloaded


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream for copies, separate from the stream that computes."""
    return torch.cuda.Stream(device)


def _copy(to: Tensor, source: Tensor) -> torch.cuda.Event | None:
    """Start a copy between host and device, ordered after all work queued on the device so far."""
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
    """Make work queued on the device from now on wait for the copy, without blocking the host."""
    if copied is not None:
        torch.cuda.current_stream(device).wait_event(copied)
