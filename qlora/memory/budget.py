"""Memory budget of a plan: one rule for `qlora train` and `qlora estimate`."""

import torch

from qlora.memory import measure
from qlora.memory.forecast import DEVICE_CONTEXT_BYTES
from qlora.recipe.sizes import parse_size

AUTO_SHARE = 0.95
"""share of the available memory that `auto` takes; the rest is a reserve for memory that the forecast misses"""


NOTICEABLE_BYTES = 256 * 2**20
"""least memory that counts as held by others; less can be a difference of this process's own CUDA context"""


def resolve_budget(memory: str, device: torch.device, capacity_bytes: int | None = None) -> int:
    """Return the bytes that a run can use under `training.memory`.

    Args:
        memory: a size, which is used unchanged, or auto.
        device: the device of the run; auto is AUTO_SHARE of its available memory.
        capacity_bytes: memory of an empty GPU on another machine; if given, auto is AUTO_SHARE of it.
    """
    if memory != "auto":
        return parse_size(memory)
    return int(AUTO_SHARE * (available_bytes(device) if capacity_bytes is None else capacity_bytes))


def available_bytes(device: torch.device) -> int:
    """Return the bytes of `device` that this process can use: the whole memory of an empty GPU.

    The process's own CUDA context is added to the free memory, because a forecast counts it.
    """
    free, capacity = measure.free_bytes(device), measure.capacity_bytes(device)
    return free if capacity is None else min(capacity, free + DEVICE_CONTEXT_BYTES)


def held_by_others(device: torch.device) -> int:
    """Return the bytes of a GPU that other programs hold, such as a desktop or another run; 0 if few, or for a CPU."""
    capacity = measure.capacity_bytes(device)
    held = 0 if capacity is None else capacity - available_bytes(device)
    return held if held >= NOTICEABLE_BYTES else 0
