"""Tensors in CUDA managed memory, which the driver moves to the host when the GPU is full.

bitsandbytes allocates this memory as a CPU tensor, which on the GPU only its own kernels can use. This module wraps
the same memory as a CUDA tensor, so every torch operation works on it in stream order. Copying into the tensor keeps
it managed, so a paged state is still paged after a checkpoint is loaded. (bitsandbytes' own `load_state_dict`
replaces it by an ordinary tensor; bitsandbytes pull request 1344.)
"""

from typing import Any

import torch
from torch import Tensor

from qlora.runtime.bnb import functional as bnb

MIN_SIZE = 100_000
"""minimum elements of a paged tensor, as in bitsandbytes: managed memory moves in large pages"""


def paged_zeros(size: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate a zeroed CUDA tensor [size] in managed memory; fp32, int16 or uint8.

    The memory is freed only when the process ends, because bitsandbytes has no call to free it. On a CPU the result is
    an ordinary tensor, for which `is_paged` is True as well.
    """
    tensor: Any
    if device.type == "cpu":
        tensor = torch.zeros(size, dtype=dtype)
    else:
        with torch.cuda.device(device):
            memory = bnb.get_paged(size, dtype=dtype, device=device)
            tensor = torch.as_tensor(_CudaArray(memory), device=device)
    tensor.is_paged = True
    return tensor.zero_()


def is_paged(tensor: Tensor) -> bool:
    """Return True if the tensor was made by `paged_zeros`."""
    return getattr(tensor, "is_paged", False)


def prefetch(tensor: Any) -> None:
    """Ask the driver to move the pages of a managed tensor, or of a view of it, to its GPU in bulk."""
    if not tensor.is_cuda:
        return
    tensor.is_paged, tensor.page_deviceid = True, tensor.device.index
    bnb.prefetch_tensor(tensor)


class _CudaArray:
    """Exposes memory to torch through Numba's CUDA array interface, version 3."""

    def __init__(self, memory: Tensor) -> None:
        self.__cuda_array_interface__ = {
            "shape": tuple(memory.shape),
            "typestr": {torch.float32: "<f4", torch.int16: "<i2", torch.uint8: "|u1"}[memory.dtype],
            "data": (memory.data_ptr(), False),  # not read-only
            "version": 3,
        }
