"""Live bytes are counted at allocation and release, and assigned to their part and phase."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import record_function

from qlora.memory.live import ROUNDING, LiveBytes, Mark, Trace
from qlora.memory.parts import PARTS
from qlora.memory.repeat import repeat, typical

COLUMN = {part: index for index, part in enumerate(PARTS)}


def rounded(size: int) -> int:
    return -(-size // ROUNDING) * ROUNDING


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 5000)), min_size=1, max_size=40))
@settings(max_examples=50, deadline=None)
def test_every_allocation_and_release_is_counted(actions: list[tuple[bool, int]]) -> None:
    held: list[Tensor] = []
    sizes: list[int] = []
    totals = []
    with LiveBytes() as live:
        for keep, number in actions:
            if keep or not held:
                held.append(torch.empty(number))
                sizes.append(rounded(4 * number))
            else:
                index = number % len(held)
                del held[index], sizes[index]
            totals.append(sum(sizes))
    assert live.trace().totals[1:].tolist() == totals


def test_views_and_changes_in_place_are_not_counted_twice() -> None:
    with LiveBytes() as live:
        a = torch.zeros(1024)
        b = a.view(32, 32).T[3:]
        b.add_(1)
        a.detach()
    assert live.trace().totals.max() == 4096


def test_earlier_tensors_count_under_their_given_part() -> None:
    weight = torch.zeros(1024)
    with LiveBytes([(weight, "base_nf4"), (weight.view(-1), "adapters")]) as live:
        weight.mul_(2)
        extra = weight + 1
    _, parts = live.trace().peak()
    assert parts["base_nf4"] == 4096
    assert parts["working_set"] == 4096
    assert parts["adapters"] == 0
    assert extra.shape == (1024,)


def test_parts_and_phases_of_a_step() -> None:
    x = torch.ones(1024)
    with LiveBytes() as live:
        with record_function("forward"):
            saved = x * 2  # 4096 bytes, needed in backward
            torch.empty(2048)  # 8192, released at once
            with record_function("loss"):
                logits = torch.empty(4096)  # 16384
        with record_function("backward"):
            gradient = saved + 1  # 4096
            del saved
        with record_function("unknown to us"):
            update = torch.empty(128)
    trace = live.trace()
    phase, parts = trace.peak()
    assert phase == "backward"
    assert {part: size for part, size in parts.items() if size} == {
        "saved_activations": 4096,
        "logits_and_loss": 16384,
        "working_set": 4096,
    }
    assert trace.phases() == {"forward": 12288, "loss": 20480, "backward": 24576}
    assert logits.numel() + gradient.numel() + update.numel() == 5248


def test_tensors_of_an_evaluation_are_never_saved_activations() -> None:
    with LiveBytes() as live:
        with record_function("evaluation"), record_function("loss"):
            kept = torch.empty(1024)
        with record_function("backward"):
            kept.add_(1)
    assert set(live.trace().phases()) == {"evaluation"}
    assert live.trace().peak()[1]["saved_activations"] == 0


def test_the_timeline_keeps_the_peak() -> None:
    with LiveBytes() as live:
        with record_function("forward"):
            for number in range(1, 1000):
                torch.empty(number if number != 777 else 50_000)
    timeline = live.trace().timeline(samples=50)
    assert timeline["phases"] == [[0, "forward"]]
    assert len(timeline["parts"]["working_set"]) <= 50
    assert max(timeline["parts"]["working_set"]) == rounded(200_000)


def trace_of(layers: int, saved: int, scratch: int) -> Trace:
    """Return a synthetic step: each layer saves `saved` after using `scratch`; the backward releases it."""
    rows: list[tuple[int, int]] = [(0, 0)]
    marks = []
    for layer in range(layers):
        marks.append(Mark(len(rows), "forward", layer))
        rows += [(layer * saved, scratch), ((layer + 1) * saved, 0)]
    for layer in reversed(range(layers)):
        marks.append(Mark(len(rows), "backward", layer))
        rows += [((layer + 1) * saved, 2 * scratch), (layer * saved, 0)]
    columns = [COLUMN["saved_activations"], COLUMN["working_set"]]
    parts = torch.zeros(len(rows), len(PARTS), dtype=torch.int64).numpy()
    parts[:, columns] = rows
    return Trace(parts, marks)


@given(st.integers(0, 30), st.integers(1, 9), st.integers(0, 50))
def test_repeating_a_layer_equals_that_many_layers(copies: int, saved: int, scratch: int) -> None:
    stretched = repeat(trace_of(3, saved, scratch), [0, *[1] * (copies + 1), 2])
    whole = trace_of(3 + copies, saved, scratch)
    assert (stretched.parts == whole.parts).all()
    assert stretched.marks == whole.marks


@given(
    st.lists(st.sampled_from("abc"), min_size=1, max_size=24),
    st.integers(0, 24),
    st.integers(0, 24),
    st.integers(1, 3),
)
def test_typical_layers_have_the_neighbours_of_those_they_represent(
    kinds: list[str], whole: int, mlps: int, neighbours: int
) -> None:
    modes = ("full " * whole + "mlp " * mlps + "none " * len(kinds)).split()[: len(kinds)]
    kept, places = typical(tuple(kinds), tuple(modes), neighbours)
    few = [modes[number] for number in kept]

    def around(layers: list[str], number: int) -> list[str]:
        padded = [""] * neighbours + layers + [""] * neighbours
        return padded[number : number + 2 * neighbours + 1]

    assert [around(few, place) for place in places] == [around(modes, n) for n in range(len(kinds))]
    assert [kinds[kept[place]] for place in places] == kinds
    pairs = list(zip(kinds, modes, strict=True))
    firsts = {pair: pairs.index(pair) for pair in pairs}
    assert all(kept[places[number]] == number for number in firsts.values())
    assert all(places.count(places[number]) == 1 for number in firsts.values())


@pytest.mark.parametrize(
    ("kinds", "few"),
    [("a" * 80, 3), ("ab" * 13, 5), ("d" + "e" * 46, 4), ("ddd" + "e" * 58, 6), ("aaaaab" * 8, 5)],
)
def test_a_pattern_of_many_layers_has_few_typical_ones(kinds: str, few: int) -> None:
    kept, _ = typical(tuple(kinds), ("none",) * len(kinds), 1)
    assert len(kept) <= few
