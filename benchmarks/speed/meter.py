"""A contender's clock and scales: the time of each step, the peak memory of each phase.

On a CPU memory is the resident set of the process (Linux), with the peak counter set back at the start of each
phase, so that what imports, loading and compiling took is told apart from what training takes. On CUDA it is
what torch's allocator gave out and reserved, and what the driver says is in use on the whole device.
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
    """Measures one contender, which calls `loaded`, `begin`, `step` after every step, and gives its adapter.

    >>> meter.loaded()
    >>> meter.begin()
    >>> for documents in workload.steps:
    ...     meter.step(loss, grad_norm, positions)
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
        self._positions = 0
        self._memory = {"imports": resident_bytes()["now"]}
        self._load_seconds = 0.0
        self._last = time.perf_counter()
        self._start_phase()

    def loaded(self) -> None:
        """The model stands in memory with its adapter and optimizer."""
        self._load_seconds = self._lap()
        self._end_phase("load")

    def begin(self) -> None:
        """The first step begins now."""
        self._lap()

    def step(self, loss: float, grad_norm: float, positions: int = 0) -> None:
        """A step has ended. `loss` and `grad_norm` are numbers: the device has been waited for."""
        self._losses.append(loss)
        self._grad_norms.append(grad_norm)
        self._positions += positions
        self._seconds.append(self._lap())
        if len(self._seconds) == self.job.warmup:
            self._end_phase("warmup")

    def count(self, positions: int) -> None:
        """Tokens that go through the model, padding included; for loops that cannot tell at the end of a step."""
        self._positions += positions

    def answer(self, adapter: Mapping[str, Tensor], settings: dict[str, Any]) -> Answer:
        """All that was measured; `adapter` holds the trained A and B under their names in the job's file."""
        self._end_phase("train")
        if self._cuda:
            free, total = torch.cuda.mem_get_info()
            self._memory["driver"] = total - free
        return Answer(
            losses=self._losses,
            grad_norms=self._grad_norms,
            seconds=self._seconds,
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
            raise ValueError(f"adapts other layers than asked: {', '.join(odd[:4])}")
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
            Path("/proc/self/clear_refs").write_text("5")  # sets the peak of the resident set back

    def _end_phase(self, name: str) -> None:
        self._memory[name] = resident_bytes()["peak"]
        if self._cuda:
            self._memory[f"{name}_allocated"] = torch.cuda.max_memory_allocated()
            self._memory[f"{name}_reserved"] = torch.cuda.max_memory_reserved()
        self._start_phase()


def resident_bytes() -> dict[str, int]:
    """The process's resident set: `now`, and its `peak` since it was last set back."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    except OSError:  # not Linux: the highest ever
        unit = 1 if sys.platform == "darwin" else 1024
        highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return {"now": highest, "peak": highest}
    return {
        "now": int(fields["VmRSS"].split()[0]) * 1024,
        "peak": int(fields["VmHWM"].split()[0]) * 1024,
    }


def contend(train: Callable[[Job, Meter], Answer]) -> None:
    """The main program of a contender: reads the job, trains, prints the answer on standard output.

    Whatever libraries print goes to standard error. An exception becomes the answer's error.
    """
    standard_output = os.dup(1)
    os.dup2(2, 1)
    job = Job.read(sys.argv[1])
    meter = Meter(job)
    warnings.simplefilter("ignore")
    try:
        torch.manual_seed(0)
        answer = train(job, meter)
    except Exception as error:  # noqa: BLE001 - reported, whatever it is
        traceback.print_exc()
        missing = isinstance(error, ModuleNotFoundError)
        answer = Answer(error=f"{type(error).__name__}: {error}".strip()[:2000], missing=missing)
    with os.fdopen(standard_output, "w") as protocol:
        protocol.write(answer.to_json() + "\n")
