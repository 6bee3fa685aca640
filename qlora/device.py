"""Which device's way a tensor takes through our operations.

Some of them do one thing on a GPU and another on a CPU. A forecast runs the step with fake CPU tensors, since
torch without CUDA has no backward pass for fake CUDA tensors; where it is asked about a GPU, these tensors stand
for the GPU's and take its way.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

_standing_for_cuda = False


def on_cuda(tensor: Tensor) -> bool:
    """Whether `tensor` lives on a GPU, or stands for one that does."""
    return tensor.is_cuda or _standing_for_cuda


@contextmanager
def standing_for_cuda(wanted: bool = True) -> Iterator[None]:
    """Within, CPU tensors stand for a GPU's. For fake tensors only: real ones would be computed another way."""
    global _standing_for_cuda
    before, _standing_for_cuda = _standing_for_cuda, wanted
    try:
        yield
    finally:
        _standing_for_cuda = before
