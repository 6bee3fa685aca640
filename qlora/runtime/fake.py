"""Fake tensors, which have a shape and a dtype but no data. No other module uses torch's fake tensors directly.

A forecast runs the training step under torch's FakeTensorMode. Without CUDA, torch cannot run a backward pass of fake
CUDA tensors, so a forecast for a GPU uses fake CPU tensors, for which our operations choose their GPU variant.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

from qlora.runtime.patches import fake_parameters_converted

LOG = logging.getLogger("torch._subclasses.fake_tensor")
"""torch's log of operations that fail on fake tensors: a traceback for each, also if the error is caught"""

_standing_for_cuda = False


class FakeTensors:
    """Makes fake tensors; with `cuda`, they represent GPU tensors. They stay valid in later `made` contexts.

    Examples:
        >>> fakes = FakeTensors(cuda=True)
        >>> with fakes.made() as fake:
        ...     model(fake(ids))
    """

    def __init__(self, *, cuda: bool) -> None:
        self._mode, self._cuda = FakeTensorMode(allow_non_fake_inputs=True), cuda

    @contextmanager
    def made(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Make all new tensors fake within the context; yield a function that makes a fake of a real tensor."""
        with self._mode, representing_cuda(self._cuda), fake_parameters_converted(is_fake):
            yield self._mode.from_tensor


def real_values() -> AbstractContextManager[object]:
    """Return a context within which new tensors are real again, to compute a value that a forecast needs."""
    return unset_fake_temporarily()


def is_fake(tensor: Tensor | None) -> bool:
    """Return True if `tensor` is fake."""
    return isinstance(tensor, FakeTensor)


@contextmanager
def representing_cuda(wanted: bool = True) -> Iterator[None]:
    """Let fake CPU tensors represent GPU tensors within the context. Real tensors would use the wrong operations."""
    global _standing_for_cuda
    before, _standing_for_cuda = _standing_for_cuda, wanted
    try:
        yield
    finally:
        _standing_for_cuda = before


def represented_device(device: torch.device) -> torch.device:
    """Return the device that tensors on `device` represent: the GPU in a forecast for a GPU, else `device`."""
    return torch.device("cuda") if _standing_for_cuda else device


@contextmanager
def failures_unlogged() -> Iterator[None]:
    """Within the context, torch does not log the operations that fail on fake tensors."""
    disabled, LOG.disabled = LOG.disabled, True
    try:
        yield
    finally:
        LOG.disabled = disabled
