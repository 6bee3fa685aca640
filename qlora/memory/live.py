"""Live tensor bytes, counted at each allocation and release. Real tensors give a measurement, fake tensors a forecast.

A dispatch mode sees every tensor that an operation returns. A new storage is counted as born; a weak reference
reports its death. (`MemTracker` of torch.distributed works alike, but refuses frozen parameters.) Memory that an
operation allocates and frees internally is not seen.

`objective` and `training` announce the phases, see `qlora.runtime.phases`.
"""

import itertools
import weakref
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qlora.memory.parts import PARTS
from qlora.runtime.phases import Allocation, Phase

PARTS_BY_NAME: dict[str, str] = {Phase.LOSS: "logits_and_loss", Allocation.DEQUANTIZATION: "dequantization"}
"""announced name -> part of the storages born under it"""

ROUNDING = 512
"""bytes; torch's CUDA allocator allocates multiples of this"""

_COLUMN = {part: index for index, part in enumerate(PARTS)}
_PHASES: tuple[str, ...] = tuple(Phase)


@dataclass(slots=True)
class _Block:
    """One storage. `born` and `died` are numbers of events; `died` is None while it lives."""

    size_bytes: int
    born: int
    phase: str
    part: str | None
    """the part, if known at birth; otherwise the lifetime decides"""
    died: int | None = None


@dataclass(frozen=True)
class Mark:
    """Phase, and decoder layer if known, from event `index` until the next mark."""

    index: int
    phase: str
    layer: int | None = None


@dataclass(frozen=True)
class Trace:
    """Live bytes over time: row i of `parts` [events, len(PARTS)] has the live bytes after event i."""

    parts: NDArray[np.int64]
    marks: Sequence[Mark]

    @property
    def totals(self) -> NDArray[np.int64]:
        """Live bytes over all parts [events]."""
        return self.parts.sum(axis=1)

    def from_first_phase(self) -> "Trace":
        """Return the trace from the first phase on. Earlier events only enter the tensors that were live before."""
        start = self.marks[0].index if self.marks else 0
        return Trace(self.parts[start:], [replace(mark, index=mark.index - start) for mark in self.marks])

    def without(self, row: NDArray[np.int64]) -> "Trace":
        """Return the trace with `row` [parts] subtracted from every event."""
        return Trace(self.parts - row, self.marks)

    def peak(self) -> tuple[str, dict[str, int]]:
        """Return the phase of the peak and the live bytes by part at the peak."""
        index = int(self.totals.argmax())
        parts = {part: int(self.parts[index, column]) for part, column in _COLUMN.items()}
        return self.phase_at(index), parts

    def phase_at(self, index: int) -> str:
        """Return the phase of event `index`."""
        place = bisect_left(self.marks, index + 1, key=lambda mark: mark.index) - 1
        return self.marks[place].phase if place >= 0 else ""

    def segments(self) -> Iterator[tuple[Mark, int]]:
        """Yield every mark with the event of the next mark."""
        ends = [mark.index for mark in self.marks[1:]] + [len(self.parts)]
        yield from zip(self.marks, ends, strict=True)

    def phases(self) -> dict[str, int]:
        """Return the peak of each phase that occurred."""
        totals = self.totals
        highest: dict[str, int] = {}
        for mark, end in self.segments():
            if mark.phase and end > mark.index:
                top = int(totals[mark.index : end].max())
                highest[mark.phase] = max(top, highest.get(mark.phase, 0))
        return highest

    def timeline(self, samples: int = 600) -> dict[str, Any]:
        """Return one step for a picture, at most `samples` events: the peak of each of as many intervals."""
        totals = self.totals
        start = self.marks[0].index if self.marks else 0
        later = (mark.index for mark in self.marks if mark.phase == Phase.EVALUATION and mark.index > start)
        end = min(next(later, len(totals)), len(totals))
        edges = np.unique(np.linspace(start, end, min(samples, end - start) + 1).astype(int))
        picked = [int(a + totals[a:b].argmax()) for a, b in itertools.pairwise(edges)]
        rows = self.parts[picked]
        phases: list[tuple[int, str]] = []
        for sample, index in enumerate(picked):
            phase = self.phase_at(index)
            if phase and (not phases or phases[-1][1] != phase):
                phases.append((sample, phase))
        parts = {part: rows[:, column].tolist() for part, column in _COLUMN.items() if rows[:, column].any()}
        return {"phases": [list(pair) for pair in phases], "parts": parts}


@dataclass
class _Clock:
    """Number of events so far, stack of announced names and marks."""

    now: int = 0
    stack: list[str | None] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)

    @property
    def phase(self) -> str:
        """The current phase. An evaluation is one phase; phases announced inside it do not count."""
        known = [name for name in self.stack if name in _PHASES]
        return Phase.EVALUATION if Phase.EVALUATION in known else known[-1] if known else ""

    def mark(self, layer: int | None = None) -> None:
        """Mark the phase and layer from the next event on."""
        mark = Mark(self.now + 1, self.phase, layer)
        if self.marks and self.marks[-1].index == mark.index:
            self.marks.pop()
        self.marks.append(mark)


class LiveBytes(TorchDispatchMode):
    """Dispatch mode that counts the live storages on one kind of device.

    Args:
        known: tensors that are live already, each with its part.
        device: "cpu" or "cuda".

    >>> with LiveBytes(inventory(model, optimizer), "cpu") as live:
    ...     accumulate(model, batches, seed=0, step=0)
    >>> phase, parts = live.trace().peak()
    """

    def __init__(self, known: Iterable[tuple[Tensor, str]] = (), device: str = "cpu") -> None:
        super().__init__()
        self.device = device
        self.clock = _Clock()
        self._blocks: list[_Block] = []
        self._alive: dict[int, tuple[weakref.ref[Any], _Block]] = {}
        for tensor, part in known:
            self._add(tensor, part)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the check costs more than the counting

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name: str = func._schema.name
        if name.startswith("profiler::"):
            self._update_stack(name, args)
        out = func(*args, **(kwargs or {}))
        part = "dequantization" if name.startswith("bitsandbytes::dequantize") else None
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self._add(tensor, part)
        return out

    def _update_stack(self, event: str, args: tuple[Any, ...]) -> None:
        if event.startswith("profiler::_record_function_enter"):
            name = args[0] if args[0] in (*Phase, *Allocation) else None
            self.clock.stack.append(name)
        elif self.clock.stack:
            name = self.clock.stack.pop()
        else:
            return
        if name in _PHASES:
            self.clock.mark()

    def _add(self, tensor: Tensor, part: str | None) -> None:
        """Count the tensor's storage, unless it is known."""
        if tensor.device.type != self.device:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        size = -(-storage.nbytes() // ROUNDING) * ROUNDING
        if size == 0:
            return
        if Allocation.HOST in self.clock.stack:
            size = 0  # host memory: never counted, also when it is seen later
        announced = [PARTS_BY_NAME[name] for name in self.clock.stack if name in PARTS_BY_NAME]
        if part is None and announced:
            part = announced[-1]
        self.clock.now += 1
        block = _Block(size, self.clock.now, self.clock.phase, part)
        self._blocks.append(block)
        self._alive[key] = weakref.ref(storage, lambda _: self._remove(key, block)), block

    def _remove(self, key: int, block: _Block) -> None:
        if self._alive.get(key, (None, None))[1] is block:
            del self._alive[key]
        self.clock.now += 1
        block.died = self.clock.now

    def trace(self) -> Trace:
        """Return the trace so far."""
        changes = np.zeros((self.clock.now + 1, len(PARTS)), dtype=np.int64)
        backwards = [mark.index for mark in self.clock.marks if mark.phase == Phase.BACKWARD]
        for block in self._blocks:
            column = _COLUMN[block.part or _part(block, backwards)]
            changes[block.born, column] += block.size_bytes
            if block.died is not None:
                changes[block.died, column] -= block.size_bytes
        return Trace(changes.cumsum(axis=0), list(self.clock.marks))


def _part(block: _Block, backwards: Sequence[int]) -> str:
    """Return the part of a block: saved activations live from forward to backward, all else is the working set."""
    if block.phase == Phase.FORWARD:
        place = bisect_left(backwards, block.born)
        if place < len(backwards) and (block.died is None or block.died >= backwards[place]):
            return "saved_activations"
    return "working_set"
