"""What memory a run really takes.

The process's own peaks cost nothing and are always there. What they consist of is told by `LiveBytes`, which
slows a step down, so a run has one step watched: the one with its largest micro-batch.
"""

import gc
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora.memory import inventory
from qlora.memory.live import LiveBytes, Trace
from qlora.memory.parts import PARTS
from qlora.optim import Optimizer


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


def free_bytes(device: torch.device) -> int:
    """Memory that a run which starts now may take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("Linux says MemAvailable since 2014")


def capacity_bytes(device: torch.device) -> int | None:
    """Memory of a GPU; None for a CPU, which shares its own with everything else."""
    return torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else None


@contextmanager
def _uncollected() -> Iterator[None]:
    """Switch garbage collection off meanwhile: it comes at a chance moment, and would free memory within a step."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


class Watch:
    """Watches those steps and evaluations of a run that `wanted` names by their number.

    >>> watch = Watch(model, optimizer, device, wanted={0}.__contains__)
    >>> with watch.over(step):
    ...     update()
    >>> watch.measured()
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, device: torch.device, wanted: Callable[[int], bool]
    ) -> None:
        self._model, self._optimizer, self._device, self._wanted = model, optimizer, device, wanted
        self._highest: Trace | None = None
        self._phases: dict[str, int] = {}
        self._steps = 0
        self._driver_bytes: int | None = None

    @contextmanager
    def over(self, step: int, *, evaluation: bool = False) -> Iterator[None]:
        """Count what lives while step number `step`, or the evaluation before it, is done."""
        if not self._wanted(step):
            yield
            return
        known = inventory.inventory(self._model, self._optimizer)
        with _uncollected(), LiveBytes(known, self._device.type) as live:
            yield
        self._take(live.trace())
        self._steps += not evaluation
        if self._device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self._device)
            self._driver_bytes = total - free

    def _take(self, trace: Trace) -> None:
        for phase, size in trace.phases().items():
            self._phases[phase] = max(size, self._phases.get(phase, 0))
        if self._highest is None or trace.totals.max() > self._highest.totals.max():
            self._highest = trace

    def measured(self) -> dict[str, Any] | None:
        """The object `measured` of memory.json; None when no step has been watched."""
        if self._highest is None or not self._steps:
            return None
        phase, parts = self._highest.peak()
        process = peak(self._device)
        if process.allocated_bytes is not None and process.reserved_bytes is not None:
            parts = self._of_gpu(parts, process.allocated_bytes, process.reserved_bytes)
        steps = "one step" if self._steps == 1 else f"{self._steps} steps"
        what = "what the driver reports" if self._driver_bytes else "live tensor bytes"
        return {
            "what": f"{what}, over {steps}",
            "total_bytes": sum(parts.values()),
            "parts": {part: size for part, size in parts.items() if size},
            "peak": phase,
            "phases": self._phases,
            "timeline": self._highest.timeline(),
            "resident_bytes": process.resident_bytes,
            "allocated_bytes": process.allocated_bytes,
            "reserved_bytes": process.reserved_bytes,
            "driver_bytes": self._driver_bytes,
        }

    def _of_gpu(self, parts: dict[str, int], allocated: int, reserved: int) -> dict[str, int]:
        """The parts of live tensors, with what only the allocator and the driver see."""
        paged = parts["optimizer_state_paged"]
        seen = sum(parts.values()) - paged
        own = {
            "working_set": parts["working_set"] + max(0, allocated - seen),  # scratch inside kernels
            "allocator_slack": max(0, reserved - allocated),
            "device_context": max(0, (self._driver_bytes or reserved) - reserved - paged),
        }
        return {part: own.get(part, parts[part]) for part in PARTS}
