"""Best-fit packing: several documents in one row of at most `max_length` tokens, almost no padding."""

from bisect import bisect_left, insort
from collections.abc import Sequence


def best_fit(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Put documents into as few rows as best-fit-decreasing finds; no document is cut.

    The longest document goes first, each into the fullest row that still has room for it: best-fit
    decreasing (Johnson et al., SIAM J. Computing 1974: at most 11/9 of the fewest possible rows, plus a
    constant; for training Ding et al., "Fewer Truncations Improve Language Modeling", arXiv:2404.10830).

    Args:
        lengths: tokens of each document, each in 1..max_length.
        max_length: tokens a row can hold.

    Returns:
        for each row the indices of its documents. Deterministic: ties go by index.
    """
    rows: list[list[int]] = []
    rows_by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # the distinct free capacities, ascending
    for document in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        length = lengths[document]
        assert 0 < length <= max_length, (
            f"document {document} has {length} tokens, a row holds 1 to {max_length}"
        )
        found = bisect_left(rooms, length)
        if found == len(rooms):
            row, room = len(rows), max_length
            rows.append([])
        else:
            room = rooms[found]
            row = rows_by_room[room].pop()
            if not rows_by_room[room]:
                del rooms[found]
        rows[row].append(document)
        left = room - length
        if left:
            if not rows_by_room.setdefault(left, []):
                insort(rooms, left)
            rows_by_room[left].append(row)
    return rows
