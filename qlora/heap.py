"""Training on a CPU: keep freed memory for the next operation.

glibc gives every large block back to the system when it is freed, and gets it back page by page, each cleared
anew: a twentieth of a step's processor time (`python -m benchmarks.speed.profile --ckpt`: 0.49 of 10.0 s).
"""

import ctypes

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
