"""Tensors in CUDA managed memory, which the driver moves to the host when the GPU is full.

bitsandbytes allocates such memory and hands it out as a CPU tensor, which on the GPU only its own kernels may
touch. Here the same memory is a CUDA tensor: every operation of torch works on it, ordered by the stream, and
copying into it leaves it where it is, so that a paged state is still paged after a checkpoint is loaded
(bitsandbytes' own `load_state_dict` replaces it by an ordinary one; bitsandbytes pull request 1344).
"""

from typing import Any

import torch
from torch import Tensor

from qlora.runtime.bnb import functional as bnb

MIN_SIZE = 100_000
"""elements below which a tensor is not paged, as bitsandbytes has it: managed memory moves in large pages"""


def paged_zeros(size: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A zeroed CUDA tensor [size], fp32, int16 or uint8, in managed memory.

    bitsandbytes has no call that frees such memory: it lives as long as the process. A CPU has none: there it is an
    ordinary tensor, which `is_paged` calls paged all the same.
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
    """Whether the tensor was made by `paged_zeros`."""
    return getattr(tensor, "is_paged", False)


def prefetch(tensor: Any) -> None:
    """Ask the driver to bring the pages of a managed tensor (or of a part of one) to its GPU in bulk."""
    if not tensor.is_cuda:
        return
    tensor.is_paged, tensor.page_deviceid = True, tensor.device.index
    bnb.prefetch_tensor(tensor)


class _CudaArray:
    """Show memory to torch through the CUDA array interface, version 3 (a protocol of Numba's)."""

    def __init__(self, memory: Tensor) -> None:
        self.__cuda_array_interface__ = {
            "shape": tuple(memory.shape),
            "typestr": {torch.float32: "<f4", torch.int16: "<i2", torch.uint8: "|u1"}[memory.dtype],
            "data": (memory.data_ptr(), False),  # may be written
            "version": 3,
        }
