"""What the allocators are told before a run.

On a CPU, to keep freed memory for the next operation. glibc gives every large block back to the system when it is
freed, and gets it back page by page, each cleared anew: a twentieth of a step's processor time
(`python -m benchmarks.speed.profile --ckpt`: 0.49 of 10.0 s).

On a GPU, to let torch's memory grow by pages. Else it comes in blocks of the size that was once asked for, and what
fits none of them takes another: 0.4 GiB at 7B and 2,048 tokens (`benchmarks/null_gpu`).
"""

import ctypes
import os

import torch

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""of glibc's mallopt(3)"""

LARGEST = 2**30
"""bytes: blocks below this come from the heap, which shrinks when this much lies free at its end"""


def keep_freed_memory() -> bool:
    """For the rest of the process; returns whether the C library could be told (glibc only)."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all(mallopt(option, LARGEST) for option in (MMAP_THRESHOLD, TRIM_THRESHOLD))


def grow_by_pages() -> None:
    """For torch's CUDA allocator, before its first use; what the user has set for it is left alone."""
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        # The variables themselves are read when torch's libraries are loaded, which is over by now
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
