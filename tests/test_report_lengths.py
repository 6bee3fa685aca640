"""The histogram of lengths, and the rows that a limit loses."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from qlora.report.lengths import histogram, limits

LENGTHS = st.dictionaries(st.integers(1, 200_000), st.integers(1, 10**6), min_size=1, max_size=40)


@given(LENGTHS)
def test_a_histogram_counts_every_document_once_in_a_terminal_of_80_columns(lengths: dict[int, int]) -> None:
    lines = list(histogram(lengths))
    total = 0
    for line in lines:
        assert len(line) <= 80
        bounds, count = line.replace(",", "").split()[:2]
        first, last = map(int, bounds.split("-"))
        assert int(count) == sum(number for length, number in lengths.items() if first <= length <= last)
        total += int(count)
    assert total == sum(lengths.values())
    assert len(lines) <= 20


def test_the_longest_bar_is_the_largest_bin() -> None:
    lines = list(histogram(Counter([33, 34, 40, 40, 41, 58])))
    assert [(line.split()[0], line.count("#")) for line in lines] == [
        ("33-36", 40), ("37-40", 40), ("41-44", 20), ("45-48", 0), ("49-52", 0), ("53-56", 0), ("57-60", 20),
    ]  # fmt: skip


def test_limits_give_the_rows_and_tokens_that_they_lose() -> None:
    lines = list(limits({100: 6, 300: 3, 1100: 1}, 512))
    assert [" ".join(line.split()) for line in lines] == [
        "256 4 rows (40%), 77% of tokens; truncated 38%",
        "512 (now) 1 rows (10%), 42% of tokens; truncated 23%",
        "1,024 1 rows (10%), 42% of tokens; truncated 3%",
    ]
    assert all(len(line) <= 80 for line in lines)
    assert list(limits({100: 6}, 512)) == []
