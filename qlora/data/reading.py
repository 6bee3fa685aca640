"""One pass over a source: rows -> examples, and for every row that does not become one the reason why."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

from qlora.data.batches import IGNORE_INDEX, Example
from qlora.data.encoding import Document, Encoded, Encoder
from qlora.data.layout import Layout
from qlora.data.sources import Record, read
from qlora.errors import DataError
from qlora.formats import BadRow, Completion, Conversation
from qlora.recipe import Data

_CHUNK = 1024  # rows encoded at a time: enough to keep the tokenizer's threads busy, little memory
_SHOWN = 10  # rows in an error message


@dataclass
class Reading:
    """What a source came to. read = len(examples) + len(bad) + dropped + unsupervised."""

    source: str
    examples: list[Example] = field(default_factory=list)
    """the rows that can be trained on"""
    contents: list[Conversation | Completion] = field(default_factory=list)
    """what is in each of them"""
    read: int = 0
    bad: list[tuple[str, BadRow]] = field(default_factory=list)
    """(file:line, why) of rows that cannot be used"""
    too_long: list[tuple[str, int]] = field(default_factory=list)
    """(file:line, tokens) of rows over max_length"""
    dropped: int = 0
    truncated: int = 0
    unsupervised: int = 0
    untrained_answers: int = 0
    spelled_controls: int = 0

    @property
    def reasons(self) -> Counter[str]:
        """How many rows are bad for each kind of reason."""
        return Counter(reason.kind for _, reason in self.bad)


def read_examples(
    section: Data, source: str, layout: Layout, encoder: Encoder, limit: int | None = None
) -> Reading:
    """Read, lay out and encode the first `limit` rows of `source`.

    Raises:
        DataError: the source cannot be read; or a row is bad, or too long, and the section calls that an
            error. The message shows the first ten such rows as file:line: reason, and totals.
    """
    reading = Reading(source)
    records = read(source, section.split, limit)
    while chunk := list(islice(records, _CHUNK)):
        rows = _readable(chunk, layout, reading)
        for (origin, content, document), encoded in zip(
            rows, encoder.encode([document for _, _, document in rows]), strict=True
        ):
            if (example := _example(origin, encoded, section, reading)) is not None:
                reading.examples.append(example)
                reading.contents.append(content)
                reading.untrained_answers += document.untrained_answers
                reading.spelled_controls += document.spells_control
    if reading.bad and section.on_bad_row == "error":
        raise DataError(_bad_rows(reading))
    if reading.too_long and section.too_long == "error":
        raise DataError(_long_rows(reading, section.max_length))
    return reading


def _readable(
    records: Sequence[Record], layout: Layout, reading: Reading
) -> list[tuple[str, Conversation | Completion, Document]]:
    """Origin, content and document of the rows that can be read; the others are noted."""
    readable = []
    for record in records:
        reading.read += 1
        try:
            if isinstance(record.row, BadRow):
                raise record.row
            content = layout.read(record.row)
            readable.append((record.origin, content, layout.document(content)))
        except BadRow as reason:
            reading.bad.append((record.origin, reason))
    return readable


def _example(origin: str, encoded: Encoded, section: Data, reading: Reading) -> Example | None:
    """The row as it is trained on; None if it is not, and why is counted.

    A truncated row ends without eos: it teaches no wrong place to stop.
    """
    ids, labels = encoded.input_ids, encoded.labels
    if encoded.forged:
        reason = BadRow("control token in text", "this tokenizer cannot write its spelling as ordinary text")
        reading.bad.append((origin, reason))
        return None
    if len(ids) > section.max_length:
        reading.too_long.append((origin, len(ids)))
        if section.too_long != "truncate":
            reading.dropped += 1
            return None
        reading.truncated += 1
        # copies, so that the long arrays can go
        ids, labels = ids[: section.max_length].copy(), labels[: section.max_length].copy()
    if (labels == IGNORE_INDEX).all():
        reading.unsupervised += 1
        return None
    return Example(ids, labels, origin)


def _bad_rows(reading: Reading) -> str:
    totals = ", ".join(f"{count} {kind}" for kind, count in reading.reasons.most_common())
    lines = [f"{reading.source}: {len(reading.bad)} of {reading.read} rows cannot be used: {totals}"]
    lines += _first([f"{origin}: {reason}" for origin, reason in reading.bad])
    if reading.reasons["missing field"]:
        lines.append("Where the data has another name for a field, set data.columns to {field: its column};")
        lines.append("where it is laid out otherwise, choose another data.format.")
    lines.append("Correct the rows, or leave them out with data.on_bad_row=skip")
    return "\n".join(lines)


def _long_rows(reading: Reading, max_length: int) -> str:
    rows = reading.too_long
    lines = [f"{reading.source}: {len(rows)} of {reading.read} rows have more than {max_length} tokens"]
    lines += _first([f"{origin}: {length} tokens" for origin, length in rows])
    longest = max(length for _, length in rows)
    lines.append(f"Set data.max_length={longest} to have them all, or data.too_long to drop or truncate")
    return "\n".join(lines)


def _first(lines: list[str]) -> list[str]:
    rest = len(lines) - _SHOWN
    return [f"  {line}" for line in lines[:_SHOWN]] + ([f"  ... and {rest} more"] if rest > 0 else [])
