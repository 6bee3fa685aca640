"""How much memory a plan may spend: one rule for `qlora train` and `qlora estimate`."""

import torch

from qlora.memory import measure
from qlora.memory.forecast import DEVICE_CONTEXT_BYTES
from qlora.recipe.sizes import parse_size

AUTO_SHARE = 0.95
"""of the available memory that `auto` takes: the rest is for what nobody forecast"""


def resolve_budget(memory: str, device: torch.device, capacity_bytes: int | None = None) -> int:
    """Bytes that a run may take under `training.memory`.

    Args:
        memory: a size, which holds as it is written, or auto.
        device: where the run is to be: auto is most of what it has available now.
        capacity_bytes: of an empty GPU that is not here: auto is most of that.
    """
    if memory != "auto":
        return parse_size(memory)
    return int(AUTO_SHARE * (available_bytes(device) if capacity_bytes is None else capacity_bytes))


def available_bytes(device: torch.device) -> int:
    """Memory that this process could take of `device`: all of an empty GPU.

    The context that the process has on a GPU is no longer free, but a forecast counts it.
    """
    free, capacity = measure.free_bytes(device), measure.capacity_bytes(device)
    return free if capacity is None else min(capacity, free + DEVICE_CONTEXT_BYTES)
