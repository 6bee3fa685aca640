"""Extends a trace of a few decoder layers to all layers of a model.

A layer's part of the trace depends on its own kind, and on what of it and of its neighbours is recomputed. So in a step
through three equal layers the middle one is typical, and a step through eighty repeats its part of the trace; a pattern
such as sliding, sliding, full needs one or two layers more. In the forward pass each layer starts at the memory level
where the previous one ended; in the backward pass the order is reversed. The result is exact, as a test checks against
all layers.
"""

import itertools
from collections import Counter
from collections.abc import Hashable, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from qlora.memory.live import Mark, Trace
from qlora.runtime.phases import Phase


@cache
def typical(
    kinds: tuple[Hashable, ...], modes: tuple[Hashable, ...], neighbours: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Choose few layers that represent all.

    A layer represents another one of its kind and mode if their neighbours have the same modes too. The first layer of
    a kind and mode represents only itself: it frees what all of them read, such as the angles of a rotary embedding.

    Args:
        kinds: the kind of each layer, such as sliding or full attention.
        modes: what of each layer is recomputed.
        neighbours: number of layers before and after a layer that count; that there is none counts too.

    Returns:
        The numbers of the chosen layers, and for each layer the place among them of the one that represents it.

    >>> typical(("dense", "experts", "experts", "experts", "experts", "experts"), ("none",) * 6, 1)
    ((0, 1, 2, 5), (0, 1, 2, 2, 2, 3))
    """
    padded = (None,) * neighbours + modes + (None,) * neighbours
    pairs = tuple(zip(kinds, modes, strict=True))
    around = [
        (padded[number : number + 2 * neighbours + 1], (pair, pair in pairs[:number]))
        for number, pair in enumerate(pairs)
    ]
    kept = tuple(range(len(kinds)))
    while (shorter := _cut(kept, around)) != kept:
        kept = shorter
    places = {around[number]: place for place, number in reversed(list(enumerate(kept)))}
    return kept, tuple(places[one] for one in around)


def _cut(kept: tuple[int, ...], around: Sequence[tuple[Hashable, Hashable]]) -> tuple[int, ...]:
    """Leave out the longest part of `kept` that others represent, if there is one.

    Its last layer and the layer before it have neighbours of the same modes, so all others keep theirs.

    around: the modes of each layer and its neighbours; its kind, and whether it is not the first of it.
    """
    counts = Counter(around[number] for number in kept)
    size = len(kept)
    for length in range(size - 1, 0, -1):
        for first in range(1, size - length + 1):
            if around[kept[first - 1]][0] != around[kept[first + length - 1]][0]:
                continue
            part = Counter(around[number] for number in kept[first : first + length])
            if all(counts[one] > count for one, count in part.items()):
                return kept[:first] + kept[first + length :]
    return kept


def repeat(trace: Trace, layers: Sequence[int]) -> Trace:
    """Return the trace of a model with more layers.

    Args:
        trace: trace of a step of a few layers, numbered from 0.
        layers: for each layer of the large model, the layer of `trace` that represents it.
    """
    if list(layers) == list(range(len(set(layers)))):
        return trace
    pieces: list[NDArray[np.int64]] = []
    marks: list[Mark] = []
    length, level = 0, 0 * trace.parts[0]

    def add(start: int, end: int, mark: Mark) -> None:
        nonlocal length, level
        if end > start:
            before = trace.parts[start - 1] if start else level
            pieces.append(trace.parts[start:end] + (level - before))
            level = pieces[-1][-1]
        marks.append(Mark(length, mark.phase, mark.layer))
        length += end - start

    first = trace.marks[0].index if trace.marks else len(trace.parts)
    if first:
        pieces.append(trace.parts[:first])
        length, level = first, trace.parts[first - 1]
    passes = itertools.groupby(trace.segments(), lambda part: (part[0].phase, part[0].layer is not None))
    for (phase, in_layers), group in passes:
        if not in_layers:
            for mark, end in group:
                add(mark.index, end, mark)
            continue
        of_layer = {mark.layer: (mark.index, end) for mark, end in group}
        order = list(enumerate(layers))
        for number, layer in reversed(order) if phase == Phase.BACKWARD else order:
            if layer in of_layer:  # without an adapter below it, a layer has no backward pass
                add(*of_layer[layer], Mark(0, phase, number))
    return Trace(np.concatenate(pieces), marks)
