"""What memory the process took, as the allocator and the operating system report it."""

import resource
import sys
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Peak:
    """Highest memory since the process began. None where there is no such number."""

    resident_bytes: int
    """the process's resident set on the host (getrusage)"""
    allocated_bytes: int | None = None
    """live tensors on the device (torch's caching allocator)"""
    reserved_bytes: int | None = None
    """what the allocator took from the device for them"""


def peak(device: torch.device) -> Peak:
    """The peaks so far."""
    # Linux counts ru_maxrss in KiB, macOS in bytes
    unit = 1 if sys.platform == "darwin" else 1024
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if device.type != "cuda":
        return Peak(resident)
    return Peak(resident, torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device))
