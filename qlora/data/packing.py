"""Best-fit packing of documents into rows of at most `max_length` tokens, with almost no padding."""

from bisect import bisect_left, insort
from collections.abc import Sequence


def best_fit(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Pack whole documents into few rows by best-fit decreasing.

    Takes the documents from longest to shortest and puts each into the fullest row that has room for it. This
    uses at most 11/9 of the fewest possible rows, plus a constant (Johnson et al., SIAM J. Computing 1974).
    For its use in training see Ding et al., "Fewer Truncations Improve Language Modeling", arXiv:2404.10830.

    Args:
        lengths: tokens of each document, each in 1..max_length.
        max_length: capacity of a row in tokens.

    Returns:
        The document indices of each row. The result is deterministic: ties go to the lower index.
    """
    rows: list[list[int]] = []
    rows_by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # the distinct numbers of free tokens, ascending
    for document in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        length = lengths[document]
        assert 0 < length <= max_length, (
            f"document {document} has {length} tokens; the limits are 1 and {max_length}"
        )
        fit = bisect_left(rooms, length)
        if fit == len(rooms):
            row, room = len(rows), max_length
            rows.append([])
        else:
            room = rooms[fit]
            row = rows_by_room[room].pop()
            if not rows_by_room[room]:
                del rooms[fit]
        rows[row].append(document)
        left = room - length
        if left:
            if not rows_by_room.setdefault(left, []):
                insort(rooms, left)
            rows_by_room[left].append(row)
    return rows
