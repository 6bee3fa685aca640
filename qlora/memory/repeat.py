"""A trace of a few layers, stretched to many.

The layers of a decoder are alike. A step through three of them tells what the one in the middle does, and a step
through eighty is the same with its part repeated: in the forward pass each copy starts where the one before it
left off, in the backward pass they come in reverse. Exact for layers of equal shapes; a test holds it.
"""

from collections.abc import Sequence

import numpy as np

from qlora.memory.live import Mark, Trace
from qlora.runtime.phases import Phase


def repeat(trace: Trace, layer: int, copies: int) -> Trace:
    """The trace of a model in which `copies` more layers like `layer` follow it.

    In the phases forward and evaluation the segments of `layer` are repeated after it, in the phase backward
    before it. Numbers of later layers are raised.
    """
    if copies == 0:
        return trace
    grow = _growth(trace, layer)
    pieces = []
    marks: list[Mark] = []
    length = 0
    lifted = 0  # copies whose saved activations live at this moment

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
    """[parts]: what the forward pass through `layer` leaves alive."""
    (segment,) = [
        (mark.index, end)
        for mark, end in trace.segments()
        if (mark.phase, mark.layer) == (Phase.FORWARD, layer)
    ]
    return trace.parts[segment[1] - 1] - trace.parts[segment[0] - 1]


def repeat_all(trace: Trace, copies: Sequence[tuple[int, int]]) -> Trace:
    """`repeat` for several (layer, copies), the numbers being those of `trace`."""
    for layer, count in sorted(copies, reverse=True):
        trace = repeat(trace, layer, count)
    return trace
