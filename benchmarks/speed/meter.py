"""Measures the time of each step and the peak memory of each phase of a contender.

On a CPU, memory is the resident set of the process (Linux). The peak counter is reset at the start of each phase, which
separates the memory of training from that of imports, loading and compiling. On CUDA, memory is what torch's allocator
allocated and reserved, and what the driver reports as used on the whole device.
"""

import os
import resource
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.speed.job import Answer, Job


class Meter:
    """Clock and memory meter of one contender.

    Example:
        >>> meter.loaded()
        >>> meter.begin()
        >>> for documents in workload.steps:
        ...     meter.step(loss, grad_norm, positions)
        >>> answer = meter.answer(adapter, settings)
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.import_seconds = time.time() - job.started
        self._cuda = job.device == "cuda"
        if self._cuda:
            torch.cuda.init()
        self._losses: list[float] = []
        self._grad_norms: list[float] = []
        self._seconds: list[float] = []
        self._processor_seconds: list[float] = []
        self._positions = 0
        self._memory = {"imports": resident_bytes()["now"]}
        self._load_seconds = 0.0
        self._last, self._last_processor = time.perf_counter(), time.process_time()
        self._start_phase()

    def loaded(self) -> None:
        """Record that model, adapter and optimizer are loaded."""
        self._load_seconds = self._lap()
        self._end_phase("load")

    def begin(self) -> None:
        """Start the clock of the first step."""
        self._lap()
        self._last_processor = time.process_time()

    def step(self, loss: float, grad_norm: float, positions: int = 0) -> None:
        """Record the end of a step. `loss` and `grad_norm` are numbers, so the device has finished the step."""
        self._losses.append(loss)
        self._grad_norms.append(grad_norm)
        self._positions += positions
        self._seconds.append(self._lap())
        now = time.process_time()
        self._processor_seconds.append(now - self._last_processor)
        self._last_processor = now
        if len(self._seconds) == self.job.warmup:
            self._end_phase("warmup")

    def count(self, positions: int) -> None:
        """Add computed tokens, padding included; for loops that do not know them at the end of a step."""
        self._positions += positions

    def answer(self, adapter: Mapping[str, Tensor], settings: dict[str, Any]) -> Answer:
        """Return all measurements; `adapter` maps the names in the job's file to the trained A and B."""
        self._end_phase("train")
        if self._cuda:
            free, total = torch.cuda.mem_get_info()
            self._memory["driver"] = total - free
        return Answer(
            losses=self._losses,
            grad_norms=self._grad_norms,
            seconds=self._seconds,
            processor_seconds=self._processor_seconds,
            positions=self._positions,
            adapter_change=self._change(adapter),
            import_seconds=self.import_seconds,
            load_seconds=self._load_seconds,
            memory=self._memory,
            settings=settings,
        )

    def _change(self, adapter: Mapping[str, Tensor]) -> float:
        initial = load_file(self.job.adapter)
        if adapter.keys() != initial.keys():
            odd = sorted(adapter.keys() ^ initial.keys())
            raise ValueError(f"the contender adapts other layers than the job asks for: {', '.join(odd[:4])}")
        changes = [(adapter[name].detach().cpu().double() - initial[name].double()) for name in initial]
        return float(torch.stack([change.norm() for change in changes]).norm())

    def _lap(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds

    def _start_phase(self) -> None:
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak of the resident set

    def _end_phase(self, name: str) -> None:
        self._memory[name] = resident_bytes()["peak"]
        if self._cuda:
            self._memory[f"{name}_allocated"] = torch.cuda.max_memory_allocated()
            self._memory[f"{name}_reserved"] = torch.cuda.max_memory_reserved()
        self._start_phase()


def resident_bytes() -> dict[str, int]:
    """Return the bytes of the resident set: `now`, and the `peak` since its last reset."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    except OSError:  # not Linux: the peak since the start
        unit = 1 if sys.platform == "darwin" else 1024
        highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return {"now": highest, "peak": highest}
    return {
        "now": int(fields["VmRSS"].split()[0]) * 1024,
        "peak": int(fields["VmHWM"].split()[0]) * 1024,
    }


def contend(train: Callable[[Job, Meter], Answer]) -> None:
    """Run a contender: read the job, train, print the answer to standard output.

    The output of libraries goes to standard error. An exception becomes the answer's error.
    """
    standard_output = os.dup(1)
    os.dup2(2, 1)
    job = Job.read(sys.argv[1])
    meter = Meter(job)
    warnings.simplefilter("ignore")
    try:
        torch.manual_seed(0)
        answer = train(job, meter)
    except Exception as error:  # noqa: BLE001 - becomes the answer's error
        traceback.print_exc()
        missing = isinstance(error, ModuleNotFoundError)
        answer = Answer(error=f"{type(error).__name__}: {error}".strip()[:2000], missing=missing)
    with os.fdopen(standard_output, "w") as protocol:
        protocol.write(answer.to_json() + "\n")
