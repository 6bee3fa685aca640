"""Measured memory of a run.

The peaks of the process cost nothing and are always known. `LiveBytes` measures their parts, but slows a step down, so
a run watches only the steps with its largest micro-batches.
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

from qlora.adapter.methods import Course
from qlora.memory import inventory
from qlora.memory.live import LiveBytes, Trace
from qlora.memory.parts import PARTS
from qlora.optim import Optimizer


@dataclass(frozen=True)
class Peak:
    """Peak memory since the process began. None if the device has no such counter."""

    resident_bytes: int
    """resident set of the process on the host (getrusage)"""
    allocated_bytes: int | None = None
    """live tensors on the device, counted by torch's caching allocator"""
    reserved_bytes: int | None = None
    """device memory that the allocator reserved for them"""


def peak(device: torch.device) -> Peak:
    """Return the peaks so far."""
    # Linux counts ru_maxrss in KiB, macOS in bytes
    unit = 1 if sys.platform == "darwin" else 1024
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if device.type != "cuda":
        return Peak(resident)
    return Peak(resident, torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device))


def free_bytes(device: torch.device) -> int:
    """Return the bytes that a run can use if it starts now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("/proc/meminfo has no MemAvailable; Linux has it since 2014")


def capacity_bytes(device: torch.device) -> int | None:
    """Return the memory of a GPU in bytes; None for a CPU, which shares its memory with other processes."""
    return torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else None


@contextmanager
def _uncollected() -> Iterator[None]:
    """Switch garbage collection off: at a random moment it would free memory in the middle of a step."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


class Watch:
    """Measures the live bytes of selected steps and evaluations of a run.

    Args:
        model: the model of the run.
        optimizer: its optimizer.
        course: what the adapter method does during the run.
        device: the device whose tensors are counted.
        wanted: returns True for the number of a step to measure.

    >>> watch = Watch(model, optimizer, course, device, wanted={0}.__contains__)
    >>> with watch.measuring(step):
    ...     update()
    >>> watch.measured()
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        course: Course,
        device: torch.device,
        wanted: Callable[[int], bool],
    ) -> None:
        self._model, self._optimizer, self._course = model, optimizer, course
        self._device, self._wanted = device, wanted
        self._highest: Trace | None = None
        self._phases: dict[str, int] = {}
        self._steps = 0
        self._driver_bytes: int | None = None

    @contextmanager
    def measuring(self, step: int, *, evaluation: bool = False) -> Iterator[None]:
        """Measure step number `step`, or the evaluation before it, if it is wanted."""
        if not self._wanted(step):
            yield
            return
        known = inventory.inventory(self._model, self._optimizer, self._course)
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
        """Return the object `measured` of memory.json; None if no step was measured."""
        if self._highest is None or not self._steps:
            return None
        phase, parts = self._highest.peak()
        process = peak(self._device)
        if process.allocated_bytes is not None and process.reserved_bytes is not None:
            parts = self._of_gpu(parts, process.allocated_bytes, process.reserved_bytes)
        steps = "one step" if self._steps == 1 else f"{self._steps} steps"
        what = "bytes reported by the driver" if self._driver_bytes else "live tensor bytes"
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
        """Return the parts of live tensors, with the memory that only the allocator and the driver see."""
        paged = parts["optimizer_state_paged"]
        seen = sum(parts.values()) - paged
        own = {
            "working_set": parts["working_set"] + max(0, allocated - seen),  # scratch inside kernels
            "allocator_slack": max(0, reserved - allocated),
            "device_context": max(0, (self._driver_bytes or reserved) - reserved - paged),
        }
        return {part: own.get(part, parts[part]) for part in PARTS}
