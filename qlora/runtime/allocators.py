"""Allocator settings.

On a CPU, freed memory is kept for the next operation. By default, glibc returns every large block to the system when it
is freed, and the system clears each page again at the next allocation: 5% of a step's processor time
(`python -m benchmarks.speed.profile --ckpt`: 0.49 of 10.0 s).

On a GPU, torch's memory grows by pages. By default, it consists of blocks of fixed sizes, and a tensor that fits in no
free block needs another one: 0.4 GiB at 7B and 2,048 tokens (`benchmarks/null_gpu`).
"""

import ctypes
import os

import torch

from qlora.runtime.gpu import under_wsl

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""option numbers of glibc's mallopt(3)"""

LARGEST = 2**30
"""bytes; smaller blocks come from the heap, which shrinks only when this much is free at its end"""


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory, for the rest of the process; return False if the C library has no such setting."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all(mallopt(option, LARGEST) for option in (MMAP_THRESHOLD, TRIM_THRESHOLD))


def return_freed_memory() -> bool:
    """Give the pages that glibc keeps back to the system once; return False if the C library cannot do it."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return False
    return bool(trim(0))


def grow_by_pages() -> None:
    """Make torch's CUDA allocator use expandable segments, unless the user has set its options, or under WSL.

    Must be called before the first CUDA allocation. Under WSL the first allocation of such a segment can fail
    (pytorch issue 192330, an error of NVIDIA's driver before R615).
    """
    if not under_wsl() and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        # too late to set the variables: torch read them when it was imported
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
