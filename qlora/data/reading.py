"""Reads a source in one pass: rows become examples, and each row left out is counted with its reason."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

from qlora.data.batches import IGNORE_INDEX, Example
from qlora.data.encoding import Document, Encoded, Encoder
from qlora.data.layout import Layout
from qlora.data.remarks import NOT_TRAINED
from qlora.data.sources import Record, read
from qlora.errors import DataError
from qlora.formats import BadRow, Completion, Conversation, NotTrained
from qlora.recipe import Data

_CHUNK = 1024  # rows encoded at a time: enough for the tokenizer's threads, few for the memory
_SHOWN = 10  # rows listed in an error message


@dataclass
class Reading:
    """Examples and row counts of a source. read + split = len(examples) + len(bad) + dropped + unsupervised."""

    source: str
    examples: list[Example] = field(default_factory=list)
    """the usable rows"""
    contents: list[Conversation | Completion] = field(default_factory=list)
    """parsed content of each example"""
    read: int = 0
    bad: list[tuple[str, BadRow]] = field(default_factory=list)
    """(file:line, reason) of rows that cannot be used"""
    too_long: list[tuple[str, int]] = field(default_factory=list)
    """(file:line, tokens) of rows longer than max_length"""
    dropped: int = 0
    truncated: int = 0
    unsupervised: int = 0
    split: int = 0
    """documents beyond the first of their row"""
    tallies: Counter[str] = field(default_factory=Counter)
    """sum of `Document.tallies` over the examples"""

    @property
    def reasons(self) -> Counter[str]:
        """Number of bad rows per kind of reason."""
        return Counter(reason.kind for _, reason in self.bad)


def read_examples(
    section: Data, source: str, layout: Layout, encoder: Encoder, limit: int | None = None
) -> Reading:
    """Read, render and encode the first `limit` rows of `source` (None: all rows).

    Raises:
        DataError: The source cannot be read, or a row is bad or too long and the section treats that as an
            error. The message has totals and the first ten such rows as file:line: reason.
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
                reading.tallies += document.tallies
    if reading.bad and section.on_bad_row == "error":
        raise DataError(_bad_rows(reading))
    if reading.too_long and section.too_long == "error":
        raise DataError(_long_rows(reading, section.max_length))
    return reading


def _readable(
    records: Sequence[Record], layout: Layout, reading: Reading
) -> list[tuple[str, Conversation | Completion, Document]]:
    """Return origin, content and document of the readable rows, which can have several; record the others."""
    readable = []
    for record in records:
        reading.read += 1
        try:
            if isinstance(record.row, BadRow):
                raise record.row
            content = layout.read(record.row)
            documents = layout.documents(content)
            reading.split += len(documents) - 1
            readable += [(record.origin, content, document) for document in documents]
        except NotTrained as mark:
            reading.unsupervised += 1
            reading.tallies[f"{NOT_TRAINED}: {mark.detail}"] += 1
        except BadRow as reason:
            reading.bad.append((record.origin, reason))
    return readable


def _example(origin: str, encoded: Encoded, section: Data, reading: Reading) -> Example | None:
    """Return the row as an Example, or None with the reason counted in `reading`.

    A truncated row has no eos, so the model does not learn to stop at the cut.
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
        # copies, so that the long arrays can be freed
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
        lines.append("If a field has another name in the data, set data.columns to {field: its column}.")
        lines.append("If the rows have another structure, choose another data.format.")
    lines.append("Correct the rows, or skip them with data.on_bad_row=skip")
    return "\n".join(lines)


def _long_rows(reading: Reading, max_length: int) -> str:
    rows = reading.too_long
    lines = [f"{reading.source}: {len(rows)} of {reading.read} rows have more than {max_length} tokens"]
    lines += _first([f"{origin}: {length} tokens" for origin, length in rows])
    longest = max(length for _, length in rows)
    lines.append(
        f"Set data.max_length={longest} to keep them whole, or set data.too_long to drop or truncate"
    )
    return "\n".join(lines)


def _first(lines: list[str]) -> list[str]:
    rest = len(lines) - _SHOWN
    return [f"  {line}" for line in lines[:_SHOWN]] + ([f"  ... and {rest} more"] if rest > 0 else [])
