"""Live tensor bytes, counted as they come and go: with real tensors a measurement, with fake ones a forecast.

A dispatch mode sees every tensor that an operation returns. The first sight of its storage is a birth, and a
weak reference tells of its death. (The `MemTracker` of torch.distributed does this too, but refuses frozen
parameters.) What an operation takes and returns to the allocator inside itself is not seen.

The phases are those that `objective` and `training` announce, see `qlora.runtime.phases`.
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
"""what is announced by these names belongs to a part of its own"""
ROUNDING = 512
"""bytes; torch's CUDA allocator hands out multiples of this"""

_COLUMN = {part: index for index, part in enumerate(PARTS)}
_PHASES: tuple[str, ...] = tuple(Phase)


@dataclass(slots=True)
class _Block:
    """One storage. `died` is None while it lives."""

    size_bytes: int
    born: int
    phase: str
    part: str | None
    """known at birth, or None: to be told from what becomes of it"""
    died: int | None = None


@dataclass(frozen=True)
class Mark:
    """From event `index` on, the process was in `phase`, and in decoder layer `layer` if that is known."""

    index: int
    phase: str
    layer: int | None = None


@dataclass(frozen=True)
class Trace:
    """Live bytes over time: row i of `parts` [events, len(PARTS)] is what lives after event i, by part."""

    parts: NDArray[np.int64]
    marks: Sequence[Mark]

    @property
    def totals(self) -> NDArray[np.int64]:
        """[events]"""
        return self.parts.sum(axis=1)

    def announced(self) -> "Trace":
        """From the first phase on: before it, only what was known is entered."""
        start = self.marks[0].index if self.marks else 0
        return Trace(self.parts[start:], [replace(mark, index=mark.index - start) for mark in self.marks])

    def without(self, row: NDArray[np.int64]) -> "Trace":
        """Less `row` [parts] at every moment."""
        return Trace(self.parts - row, self.marks)

    def peak(self) -> tuple[str, dict[str, int]]:
        """The phase with the most live bytes, and what lived then by part."""
        index = int(self.totals.argmax())
        parts = {part: int(self.parts[index, column]) for part, column in _COLUMN.items()}
        return self.phase_at(index), parts

    def phase_at(self, index: int) -> str:
        """The phase of event `index`."""
        place = bisect_left(self.marks, index + 1, key=lambda mark: mark.index) - 1
        return self.marks[place].phase if place >= 0 else ""

    def segments(self) -> Iterator[tuple[Mark, int]]:
        """Every mark with the event at which the next one takes over."""
        ends = [mark.index for mark in self.marks[1:]] + [len(self.parts)]
        yield from zip(self.marks, ends, strict=True)

    def phases(self) -> dict[str, int]:
        """The most live bytes in each phase that occurred."""
        totals = self.totals
        highest: dict[str, int] = {}
        for mark, end in self.segments():
            if mark.phase and end > mark.index:
                top = int(totals[mark.index : end].max())
                highest[mark.phase] = max(top, highest.get(mark.phase, 0))
        return highest

    def timeline(self, samples: int = 600) -> dict[str, Any]:
        """A step at `samples` points at most, each the highest moment of its stretch, for a picture."""
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
    """Events so far, and what is going on."""

    now: int = 0
    stack: list[str | None] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)

    @property
    def phase(self) -> str:
        """An evaluation is one phase, whatever goes on within it."""
        known = [name for name in self.stack if name in _PHASES]
        return Phase.EVALUATION if Phase.EVALUATION in known else known[-1] if known else ""

    def mark(self, layer: int | None = None) -> None:
        """Note the phase and layer from here on."""
        mark = Mark(self.now + 1, self.phase, layer)
        if self.marks and self.marks[-1].index == mark.index:
            self.marks.pop()
        self.marks.append(mark)


class LiveBytes(TorchDispatchMode):
    """Counts the storages on one kind of device that live while the mode is on.

    known: tensors that live already, with the part they belong to. device: "cpu" or "cuda".

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
            self._see(tensor, part)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the guard costs more than the counting

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name: str = func._schema.name
        if name.startswith("profiler::"):
            self._hear(name, args)
        out = func(*args, **(kwargs or {}))
        part = "dequantization" if name.startswith("bitsandbytes::dequantize") else None
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self._see(tensor, part)
        return out

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if event.startswith("profiler::_record_function_enter"):
            name = args[0] if args[0] in (*Phase, *Allocation) else None
            self.clock.stack.append(name)
        elif self.clock.stack:
            name = self.clock.stack.pop()
        else:
            return
        if name in _PHASES:
            self.clock.mark()

    def _see(self, tensor: Tensor, part: str | None) -> None:
        """Note the tensor's storage, if it is new."""
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
            size = 0  # from here on, wherever it is seen again
        announced = [PARTS_BY_NAME[name] for name in self.clock.stack if name in PARTS_BY_NAME]
        if part is None and announced:
            part = announced[-1]
        self.clock.now += 1
        block = _Block(size, self.clock.now, self.clock.phase, part)
        self._blocks.append(block)
        self._alive[key] = weakref.ref(storage, lambda _: self._bury(key, block)), block

    def _bury(self, key: int, block: _Block) -> None:
        if self._alive.get(key, (None, None))[1] is block:
            del self._alive[key]
        self.clock.now += 1
        block.died = self.clock.now

    def trace(self) -> Trace:
        """What has happened so far."""
        changes = np.zeros((self.clock.now + 1, len(PARTS)), dtype=np.int64)
        backwards = [mark.index for mark in self.clock.marks if mark.phase == Phase.BACKWARD]
        for block in self._blocks:
            column = _COLUMN[block.part or _part(block, backwards)]
            changes[block.born, column] += block.size_bytes
            if block.died is not None:
                changes[block.died, column] -= block.size_bytes
        return Trace(changes.cumsum(axis=0), list(self.clock.marks))


def _part(block: _Block, backwards: Sequence[int]) -> str:
    """What a forward pass leaves for the backward pass is saved; everything else is in flight."""
    if block.phase == Phase.FORWARD:
        place = bisect_left(backwards, block.born)
        if place < len(backwards) and (block.died is None or block.died >= backwards[place]):
            return "saved_activations"
    return "working_set"
