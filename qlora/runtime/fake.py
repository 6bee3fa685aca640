"""Fake tensors, which have a shape and a dtype but no numbers: all that the rest of the package knows of them.

A forecast runs the step under torch's FakeTensorMode. torch without CUDA has no backward pass for fake CUDA tensors, so
a forecast for a GPU uses fake CPU tensors, which take the GPU's way through our operations.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

_standing_for_cuda = False


class FakeTensors:
    """Makes fake tensors, which stand for a GPU's if `cuda`. Those of one time within serve the next time too.

    >>> fakes = FakeTensors(cuda=True)
    >>> with fakes.made() as fake:
    ...     model(fake(ids))
    """

    def __init__(self, *, cuda: bool) -> None:
        self._mode, self._cuda = FakeTensorMode(allow_non_fake_inputs=True), cuda

    @contextmanager
    def made(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Within, new tensors are fake; yields what makes a fake of a real tensor."""
        with self._mode, standing_for_cuda(self._cuda):
            yield self._mode.from_tensor


def real_values() -> AbstractContextManager[object]:
    """A context within which new tensors are real again, for a value that a forecast needs."""
    return unset_fake_temporarily()


def is_fake(tensor: Tensor) -> bool:
    """Whether `tensor` has no numbers."""
    return isinstance(tensor, FakeTensor)


@contextmanager
def standing_for_cuda(wanted: bool = True) -> Iterator[None]:
    """Within, tensors stand for a GPU's. For fake ones only: real ones would be computed another way."""
    global _standing_for_cuda
    before, _standing_for_cuda = _standing_for_cuda, wanted
    try:
        yield
    finally:
        _standing_for_cuda = before


def stood_for(device: torch.device) -> torch.device:
    """The device that tensors on `device` stand for: their own, except in a forecast for a GPU."""
    return torch.device("cuda") if _standing_for_cuda else device
