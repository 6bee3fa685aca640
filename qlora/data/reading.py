"""Reads a source in one pass: rows become examples, and each row left out is counted with its reason.

Only the tokens of a row are kept. The texts of held-out rows are read again, by `contents`.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from qlora.data.encoding import CannotEncode, Document, Encoded, Encoder
from qlora.data.examples import IGNORE_INDEX, ExampleWriter
from qlora.data.files import Record
from qlora.data.layout import Layout
from qlora.data.refusals import Refusals
from qlora.data.remarks import JOINED, NOT_TRAINED, SPLIT_TEXTS
from qlora.data.sources import count, read
from qlora.errors import DataError
from qlora.formats import BadRow, Completion, Conversation, NotTrained, Row
from qlora.recipe import Data
from qlora.runtime.progress import Progress

_ROWS = 1024  # rows encoded at a time: enough for the tokenizer's threads
_SYSTEMS = 16  # different system messages that are kept of a source
_CHARACTERS = 2**21  # characters encoded at a time: a tokenizer needs about a hundred bytes for each token


@dataclass
class Reading:
    """Row counts of a source. read + split = kept examples + bad + marked + dropped + unsupervised."""

    source: str
    examples: range = range(0)
    """numbers of the examples in the writer"""
    rows: list[int] = field(default_factory=list)
    """number of the row of each example, from 0"""
    read: int = 0
    bad: Refusals = field(default_factory=Refusals)
    """rows that cannot be used"""
    too_long: Refusals = field(default_factory=Refusals)
    """rows longer than max_length"""
    lengths: Counter[int] = field(default_factory=Counter)
    """number of documents by length in tokens, before they are cut or left out"""
    dropped: int = 0
    truncated: int = 0
    unsupervised: int = 0
    marked: int = 0
    """rows marked as not to be trained"""
    split: int = 0
    """documents beyond the first of their row"""
    tallies: Counter[str] = field(default_factory=Counter)
    """sum of `Document.tallies` over the examples"""
    systems: dict[str | None, int] = field(default_factory=dict)
    """different system messages of the examples, each with its number; only the first ones have one of their own"""
    system_numbers: list[int] = field(default_factory=list)
    """number of the system message of each example"""

    def add_systems(self, system: str | None, examples: int) -> None:
        """Note the system message of the next examples."""
        number = self.systems.setdefault(system, len(self.systems)) if len(self.systems) < _SYSTEMS else -1
        self.system_numbers += [self.systems.get(system, number)] * examples


class _Rendered(NamedTuple):
    row: int
    origin: str
    document: Document


def records_of(section: Data, rows: Sequence[Row] | None = None) -> Iterator[Record]:
    """Yield the rows of `section.source`, or those given, which its name then stands for in messages."""
    if rows is None:
        return read(section.source_name, section.split, section.limit)
    numbered = enumerate(rows[: section.limit], 1)
    return (
        Record(
            f"{section.source}:row {number}",
            row if isinstance(row, Mapping) else BadRow("not an object", "a row must be a dictionary"),
        )
        for number, row in numbered
    )


def _total(section: Data, rows: Sequence[Row] | None) -> int | None:
    total = count(section.source_name, section.split) if rows is None else len(rows)
    return total if total is None or section.limit is None else min(total, section.limit)


def read_examples(
    section: Data,
    layout: Layout,
    writer: ExampleWriter,
    rows: Sequence[Row] | None = None,
    progress: Progress | None = None,
) -> Reading:
    """Read, render and encode the rows of one source, and write the usable ones as examples.

    Raises:
        DataError: The source cannot be read, or a row is bad or too long and the section treats that as an
            error. The message has totals, and the first rows of each kind as file:line: reason.
    """
    reading = Reading(section.source_name)
    first = len(writer)
    total = None if progress is None else _total(section, rows)
    for chunk in _chunks(_rendered(records_of(section, rows), layout, reading)):
        for (row, origin, document), encoded in _encoded(chunk, layout.encoder, reading):
            pieces = _pieces(origin, encoded, section, reading)
            for ids, labels in pieces:
                writer.append(ids, labels, origin)
                reading.rows.append(row)
            if pieces:
                reading.tallies += document.tallies
                reading.tallies += Counter({JOINED: encoded.joined})
                reading.add_systems(document.system, len(pieces))
        if progress is not None:
            of_total = f" of {total:,}" if total is not None and total >= reading.read else ""
            progress(f"tokenizing {section.source}: {reading.read:,}{of_total} rows")
    reading.examples = range(first, len(writer))
    if reading.bad and section.on_bad_row == "error":
        raise DataError(reading.bad.explained(reading, section))
    if reading.too_long and section.too_long == "error":
        raise DataError(_long_rows(reading, section.max_length))
    return reading


def contents(
    section: Data, layout: Layout, wanted: Collection[int], rows: Sequence[Row] | None = None
) -> Iterator[tuple[int, str, Conversation | Completion]]:
    """Read the source again, and yield number, origin and parsed content of the wanted rows, in their order.

    Raises:
        DataError: The source has changed, so that a row cannot be read any more.
    """
    last = max(wanted, default=-1)
    for number, record in enumerate(records_of(section, rows) if wanted else ()):
        if number in wanted:
            try:
                if isinstance(record.row, BadRow):
                    raise record.row
                yield number, record.origin, layout.read(record.row)
            except BadRow as error:
                raise DataError(
                    f"{record.origin}: the row has changed while the data were read: {error}"
                ) from None
        if number == last:
            return


def _rendered(records: Iterable[Record], layout: Layout, reading: Reading) -> Iterator[_Rendered]:
    """Yield the documents of the readable rows, which can have several; record the other rows."""
    for number, record in enumerate(records):
        reading.read += 1
        try:
            if isinstance(record.row, BadRow):
                raise record.row
            documents = layout.documents(layout.read(record.row))
        except NotTrained as mark:
            reading.marked += 1
            reading.tallies[f"{NOT_TRAINED}: {mark.detail}"] += 1
            continue
        except BadRow as reason:
            reading.bad.add(record.origin, reason, record.row)
            continue
        reading.split += len(documents) - 1
        yield from (_Rendered(number, record.origin, document) for document in documents)


def _chunks(rendered: Iterable[_Rendered]) -> Iterator[list[_Rendered]]:
    """Group documents so that their encodings need little memory."""
    chunk: list[_Rendered] = []
    characters = 0
    for item in rendered:
        chunk.append(item)
        characters += sum(len(part.text) for part in item.document.parts)
        if len(chunk) == _ROWS or characters >= _CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _encoded(
    chunk: list[_Rendered], encoder: Encoder, reading: Reading
) -> Iterator[tuple[_Rendered, Encoded]]:
    """Yield the documents with their encodings; record those on which the tokenizer fails."""
    try:
        yield from zip(chunk, encoder.encode([rendered.document for rendered in chunk]), strict=True)
    except CannotEncode as error:
        if len(chunk) == 1:
            reading.bad.add(chunk[0].origin, BadRow("the tokenizer fails on its text", error.reason), {})
            return
        for rendered in chunk:
            yield from _encoded([rendered], encoder, reading)


def _pieces(
    origin: str, encoded: Encoded, section: Data, reading: Reading
) -> list[tuple[NDArray[np.int32], NDArray[np.int32]]]:
    """Return token ids and labels of a document's examples: one, none with the reason counted, or several if it is
    split.

    A truncated row has no eos, so the model does not learn to stop at the cut.
    """
    ids, labels = encoded.input_ids, encoded.labels
    longest = section.max_length
    reading.lengths[len(ids)] += 1
    if encoded.forged:
        reason = BadRow("control token in text", "this tokenizer cannot write its spelling as ordinary text")
        reading.bad.add(origin, reason, {})
        return []
    if len(ids) > longest:
        reading.too_long.add(origin, BadRow(f"{len(ids)} tokens"), {})
        if section.too_long == "split":
            reading.tallies[SPLIT_TEXTS] += 1
            # A piece begins with the last token of the piece before it, so that every token is trained once.
            starts = range(0, len(ids) - 1, longest - 1)
            reading.split += len(starts) - 1
            return [
                _without_first(ids[start : start + longest], labels[start : start + longest])
                for start in starts
            ]
        if section.too_long != "truncate":
            reading.dropped += 1
            return []
        reading.truncated += 1
        ids, labels = ids[:longest], labels[:longest]
    if (labels == IGNORE_INDEX).all():
        reading.unsupervised += 1
        return []
    return [(ids, labels)]


def _without_first(
    ids: NDArray[np.int32], labels: NDArray[np.int32]
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return ids and labels of a piece, in which the first token is context."""
    labels = labels.copy()
    labels[0] = IGNORE_INDEX
    return ids, labels


def _long_rows(reading: Reading, max_length: int) -> str:
    total = reading.too_long.total
    lines = [f"{reading.source}: {total} of {reading.read} rows have more than {max_length} tokens"]
    lines += reading.too_long.lines()
    lines.append(
        f"Set data.max_length={max(reading.lengths)} to keep them whole, or set data.too_long to drop or truncate"
    )
    return "\n".join(lines)
