"""Best-fit packing loses and repeats no document, makes no row too long and wastes almost no space."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora.data.packing import best_fit

LENGTHS = st.integers(1, 64).flatmap(
    lambda longest: st.tuples(st.lists(st.integers(1, longest), max_size=200), st.integers(longest, 80))
)


@given(LENGTHS)
@settings(deadline=None)
def test_no_row_is_too_long_and_every_document_is_in_exactly_one(case: tuple[list[int], int]) -> None:
    lengths, max_length = case
    rows = best_fit(lengths, max_length)
    assert all(sum(lengths[document] for document in row) <= max_length for row in rows)
    assert sorted(document for row in rows for document in row) == list(range(len(lengths)))
    assert all(rows)


@given(LENGTHS)
@settings(deadline=None)
def test_packs_as_the_textbook_algorithm_does(case: tuple[list[int], int]) -> None:
    lengths, max_length = case
    room: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row, free in enumerate(room) if free >= length]
        if fitting:
            room[min(fitting, key=lambda row: room[row])] -= length
        else:
            room.append(max_length - length)
    rows = best_fit(lengths, max_length)
    assert sorted(max_length - sum(lengths[document] for document in row) for row in rows) == sorted(room)


@given(LENGTHS)
@settings(deadline=None)
def test_deterministic(case: tuple[list[int], int]) -> None:
    assert best_fit(*case) == best_fit(*case)


def test_at_least_98_percent_of_alpaca_like_rows_are_real_tokens() -> None:
    # Alpaca's lengths: about log-normal, mean about 200 tokens, long tail cut at 2048
    for seed in range(5):
        lengths = (
            np.random.default_rng(seed).lognormal(np.log(200) - 0.32, 0.8, 20_000).astype(int).clip(1, 2048)
        )
        assert 180 < lengths.mean() < 220
        rows = best_fit(lengths.tolist(), 2048)
        assert lengths.sum() / (len(rows) * 2048) >= 0.98


def test_a_document_longer_than_a_row_is_a_programming_error() -> None:
    with pytest.raises(AssertionError, match="9 tokens"):
        best_fit([3, 9], 8)
