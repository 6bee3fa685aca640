"""Extends a trace of a few decoder layers to many.

The layers of a decoder are equal. In a step through three layers the middle one is typical, and a step through eighty
repeats its part of the trace. In the forward pass each copy starts at the memory level where the previous one ended; in
the backward pass the order is reversed. The result is exact for layers of equal shapes, as a test checks.
"""

from collections.abc import Sequence

import numpy as np

from qlora.memory.live import Mark, Trace
from qlora.runtime.phases import Phase


def repeat(trace: Trace, layer: int, copies: int) -> Trace:
    """Return the trace of a model with `copies` more layers like `layer` after it.

    The segments of `layer` are repeated after it in the phases forward and evaluation, before it in the phase
    backward. Later layers get higher numbers.
    """
    if copies == 0:
        return trace
    grow = _growth(trace, layer)
    pieces = []
    marks: list[Mark] = []
    length = 0
    lifted = 0  # number of copies whose saved activations are live

    def add(start: int, end: int, mark: Mark, number: int | None) -> None:
        nonlocal length
        pieces.append(trace.parts[start:end] + lifted * grow)
        marks.append(Mark(length, mark.phase, number))
        length += end - start

    first = trace.marks[0].index if trace.marks else len(trace.parts)
    pieces.append(trace.parts[:first])
    length = first
    for mark, end in trace.segments():
        number = mark.layer + copies if mark.layer is not None and mark.layer > layer else mark.layer
        if mark.layer != layer:
            add(mark.index, end, mark, number)
        elif mark.phase == Phase.BACKWARD:
            for lifted in range(copies, -1, -1):
                add(mark.index, end, mark, layer + lifted)
        elif mark.phase == Phase.FORWARD:
            for lifted in range(copies + 1):
                add(mark.index, end, mark, layer + lifted)
        else:
            for copy in range(copies + 1):
                add(mark.index, end, mark, layer + copy)
    return Trace(np.concatenate(pieces), marks)


def _growth(trace: Trace, layer: int) -> np.ndarray:
    """Return the bytes [parts] that stay live after the forward pass through `layer`."""
    (segment,) = [
        (mark.index, end)
        for mark, end in trace.segments()
        if (mark.phase, mark.layer) == (Phase.FORWARD, layer)
    ]
    return trace.parts[segment[1] - 1] - trace.parts[segment[0] - 1]


def repeat_all(trace: Trace, copies: Sequence[tuple[int, int]]) -> Trace:
    """Apply `repeat` for several (layer, copies); layer numbers are those of `trace`."""
    for layer, count in sorted(copies, reverse=True):
        trace = repeat(trace, layer, count)
    return trace
