"""Turns a recipe's `data` section into training examples, held-out examples and row counts."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from qlora.data.batches import Batch, Batches
from qlora.data.examples import Examples, ExampleWriter
from qlora.data.layout import Layout
from qlora.data.mixture import Share, shares
from qlora.data.order import SPLIT, permutation
from qlora.data.packing import best_fit
from qlora.data.reading import Reading, contents, read_examples
from qlora.data.sources import UnreadSource
from qlora.errors import DataError
from qlora.formats import Row
from qlora.recipe import Data, Recipe
from qlora.runtime.progress import Progress


class Prompt(NamedTuple):
    """A held-out row as a prompt for generation."""

    input_ids: list[int]
    text: str
    """the question, without the template around it"""
    reference: str
    """the answer in the data"""
    origin: str
    before: str = ""
    """the messages before the question, shortened"""


@dataclass(frozen=True)
class Counts:
    """Row counts by outcome: read + split = bad + marked + dropped + unsupervised + train + held_out."""

    read: int
    split: int
    """documents beyond the first of their row, for rows that give several"""
    bad: int
    """unusable rows, skipped (`on_bad_row: skip`)"""
    dropped: int
    """rows longer than max_length, left out (`too_long: drop`)"""
    truncated: int
    """rows longer than max_length, cut (`too_long: truncate`); also counted in train, held_out or unsupervised"""
    marked: int
    """rows marked as not to be trained, as by `label: false`; left out"""
    unsupervised: int
    """rows without a trained token, left out; usually the prompt alone fills max_length"""
    train: int
    held_out: int
    repeated: int
    """training rows with exactly the tokens of an earlier training row"""
    held_out_seen: int
    """held-out rows with exactly the tokens of a training row"""
    tokens: int
    """tokens in the training rows"""
    supervised: int
    """trained tokens in the training rows"""
    packing_efficiency: float | None
    """share of non-padding tokens in packed training rows padded to max_length; None without packing"""
    reasons: dict[str, int]
    """number of bad rows by reason"""
    tallies: dict[str, int]
    """parts of kept rows that are not trained or do not reach the model, by the names in `qlora.data.remarks`"""
    sources: list[dict[str, Any]]
    """of each source of training rows: source, and the counts read, bad, marked, dropped, unsupervised, train, held_out
    and per_epoch, the number of its rows in an epoch"""


@dataclass(frozen=True)
class Dataset:
    """Training rows and held-out rows of a run. No row is in both."""

    train: Examples
    held_out: Examples
    prompts: list[Prompt]
    """one per held-out row"""
    counts: Counts
    fingerprint: str
    """SHA-256 of all token ids and labels in order; equal only if a run sees the same data"""
    pad_id: int
    """padding token; padding is never trained, even if this token has another meaning"""
    stop_ids: frozenset[int]
    """tokens that end an answer"""
    mixture: tuple[Share, ...] = ()
    """share of each source in an epoch; empty: an epoch has all rows"""
    shared_system: str | None = None
    """system message that all training rows have; None if they differ or have none"""
    lengths: dict[int, int] = field(default_factory=dict)
    """number of documents by length in tokens, before they are cut or left out as too long"""
    left_out: list[str] = field(default_factory=list)
    """first rows that are left out, one line for each reason: file:line: reason"""


@dataclass
class _Source:
    """A source on its way to examples."""

    section: Data
    layout: Layout
    reading: Reading
    rows: Sequence[Row] | None = None
    train: list[int] = field(default_factory=list)
    """numbers of its examples for training"""
    held_out: list[int] = field(default_factory=list)
    """numbers of its examples for evaluation"""


def make_dataset(
    section: Data,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    rows: Sequence[Row] | None = None,
    progress: Progress | None = None,
) -> Dataset:
    """Read, render, tokenise and split the rows of a `data` section. Arguments and errors as in `load_dataset`."""
    evaluation = section.evaluation  # a copy of the section, another one at each access
    parts = [*section.parts, *([evaluation] if evaluation else [])]
    with ExampleWriter() as writer:
        sources = []
        for number, part in enumerate(parts):
            given = None if part is evaluation else rows
            layout = Layout(part, tokenizer)
            try:
                reading = read_examples(part, layout, writer, given, progress)
            except UnreadSource as error:
                raise UnreadSource(error.reason, _key(section, number)) from error
            if not reading.examples:
                raise DataError(_nothing_left(reading, part))
            sources.append(_Source(part, layout, reading, given))
        examples = writer.examples()
    _split(sources, section, seed)
    mixture = _mixture(section, sources)
    train = examples.select(number for source in sources for number in source.train)
    held_out = examples.select(number for source in sources for number in source.held_out)
    return Dataset(
        train=train,
        held_out=held_out,
        prompts=[prompt for source in sources for prompt in _prompts(source)],
        counts=_counts(sources, train, held_out, mixture, section),
        fingerprint=_fingerprint(train, held_out, mixture),
        pad_id=next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0),
        stop_ids=frozenset().union(*(source.layout.answer_ends for source in sources)),
        mixture=mixture,
        shared_system=_shared_system(sources),
        lengths=dict(sorted(sum((source.reading.lengths for source in sources), Counter[int]()).items())),
        left_out=[line.strip() for source in sources for line in _left_out(source.reading)],
    )


def _shared_system(sources: Sequence[_Source]) -> str | None:
    """Return the system message that all training rows have, or None."""
    systems: set[str | None] = set()
    for source in sources:
        reading = source.reading
        texts = {number: system for system, number in reading.systems.items()}
        numbers = {reading.system_numbers[example - reading.examples.start] for example in source.train}
        systems |= {texts.get(number) for number in numbers}
    return systems.pop() if len(systems) == 1 else None


def training_batches(dataset: Dataset, recipe: Recipe) -> Batches:
    """Return the optimizer steps over the training rows, with the batch sizes of the recipe."""
    return _batches(dataset.train, dataset, recipe, dataset.mixture)


def held_out_batches(dataset: Dataset, recipe: Recipe) -> list[Batch]:
    """Return all held-out rows once, in micro-batches of the recipe's size."""
    return _batches(dataset.held_out, dataset, recipe).evaluation()


def _batches(examples: Examples, dataset: Dataset, recipe: Recipe, mixture: Sequence[Share] = ()) -> Batches:
    return Batches(
        examples,
        micro_batch_size=recipe.training.micro_batch_size,
        global_batch_size=recipe.training.global_batch_size,
        max_length=recipe.data.max_length,
        packing=recipe.data.packing,
        pad_id=dataset.pad_id,
        seed=recipe.training.seed,
        mixture=mixture,
    )


def _split(sources: Sequence[_Source], section: Data, seed: int) -> None:
    """Divide the examples of each source into those for training and those for evaluation.

    All examples of one row go to the same side.
    """
    training = sources[:-1] if section.evaluation else sources
    for source in sources[len(training) :]:
        source.held_out = list(source.reading.examples)
    usable = [(source, row) for source in training for row in dict.fromkeys(source.reading.rows)]
    chosen = set() if section.evaluation else _held_out(len(usable), section, seed)
    held_out = {(id(source), row) for index, (source, row) in enumerate(usable) if index in chosen}
    for source in training:
        for number, row in zip(source.reading.examples, source.reading.rows, strict=True):
            side = source.held_out if (id(source), row) in held_out else source.train
            side.append(number)


def _held_out(rows: int, section: Data, seed: int) -> set[int]:
    """Choose the held-out row numbers, by count or by share. A share is rounded to at least one row on each side."""
    held_out = section.held_out
    if isinstance(held_out, int):
        if held_out >= rows:
            raise DataError(
                f"data.held_out: cannot hold out {held_out} rows, because {section.names} has only {rows} usable "
                f"{'row' if rows == 1 else 'rows'} and at least one must remain for training; set a smaller number"
            )
        wanted = held_out
    else:
        wanted = min(max(1, round(rows * float(held_out))), rows - 1)
    return set(permutation(rows, seed, SPLIT)[:wanted].tolist())


def _left_out(reading: Reading) -> list[str]:
    return [*reading.bad.lines(), *(reading.too_long.lines() if reading.dropped else [])]


def _mixture(section: Data, sources: Sequence[_Source]) -> tuple[Share, ...]:
    weights = [source.weight for source in section.sources]
    rows = [source.rows for source in section.sources]
    if not any(weights) and not any(rows):
        return ()
    totals = [len(source.train) for source in sources[: len(weights)]]
    for source, total in zip(sources, totals, strict=False):
        if not total:
            raise DataError(
                f"{source.section.source}: all usable rows are held out, so none is left to mix; set a smaller "
                "data.held_out"
            )
    return shares(totals, weights, rows)


def _key(section: Data, part: int) -> str:
    """Return the key of a source: of the training rows in their order, then of the held-out rows."""
    if part == len(section.parts):
        return "data.held_out"
    return f"data.sources[{part}].source" if section.sources else "data.source"


def _prompts(source: _Source) -> list[Prompt]:
    """Return the held-out rows of a source as prompts. Their texts are read again, because only tokens are kept."""
    first = source.reading.examples.start
    wanted = {source.reading.rows[number - first] for number in source.held_out}
    origins, questions = [], []
    for _, origin, content in contents(source.section, source.layout, wanted, source.rows):
        origins.append(origin)
        questions.append(source.layout.question(content))
    encoded = source.layout.encoder.encode([question.document for question in questions])
    return [
        Prompt(tokens.input_ids.tolist(), question.text, question.reference, origin, question.before)
        for origin, question, tokens in zip(origins, questions, encoded, strict=True)
    ]


def _counts(
    sources: Sequence[_Source],
    train: Examples,
    held_out: Examples,
    mixture: Sequence[Share],
    section: Data,
) -> Counts:
    readings = [source.reading for source in sources]
    lengths = train.lengths.tolist()
    packed_rows = len(best_fit(lengths, section.max_length)) if section.packing else 0
    seen = train.digests
    reasons: Counter[str] = sum((reading.bad.kinds for reading in readings), Counter())
    return Counts(
        read=sum(reading.read for reading in readings),
        split=sum(reading.split for reading in readings),
        bad=reasons.total(),
        dropped=sum(reading.dropped for reading in readings),
        truncated=sum(reading.truncated for reading in readings),
        marked=sum(reading.marked for reading in readings),
        unsupervised=sum(reading.unsupervised for reading in readings),
        train=len(train),
        held_out=len(held_out),
        repeated=len(train) - len(seen),
        held_out_seen=held_out.among(seen),
        tokens=sum(lengths),
        supervised=int(train.supervised.sum(dtype=np.int64)),
        packing_efficiency=sum(lengths) / (packed_rows * section.max_length) if packed_rows else None,
        reasons=dict(reasons.most_common()),
        tallies=dict(sum((reading.tallies for reading in readings), Counter()).most_common()),
        sources=[
            {
                "source": source.section.source_name,
                "read": source.reading.read,
                "bad": source.reading.bad.total,
                "dropped": source.reading.dropped,
                "marked": source.reading.marked,
                "unsupervised": source.reading.unsupervised,
                "train": len(source.train),
                "held_out": len(source.held_out),
                "per_epoch": mixture[number].per_epoch if mixture else len(source.train),
            }
            for number, source in enumerate(sources[: len(section.parts)])
        ],
    )


def _fingerprint(train: Examples, held_out: Examples, mixture: Sequence[Share]) -> str:
    digest = hashlib.sha256()
    train.add_to(digest)
    held_out.add_to(digest)
    for share in mixture:
        digest.update(np.array([share.total, share.per_epoch], dtype="<i8").tobytes())
    return digest.hexdigest()


def _nothing_left(reading: Reading, section: Data) -> str:
    outcomes = {
        "bad": reading.bad.total,
        "longer than data.max_length": reading.dropped,
        "marked as not to be trained": reading.marked,
        "without a trained token": reading.unsupervised,
    }
    if not reading.read:
        return f"{reading.source}: the source has no rows. Give a source with rows"
    counts = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items() if count)
    lines = [f"{reading.source}: none of {reading.read} rows can be used: {counts}"]
    if reading.bad:
        lines.append(reading.bad.explained(reading, section))
    if reading.too_long:
        lines += reading.too_long.lines()
    if reading.dropped or reading.unsupervised:
        lines.append(f"Raise data.max_length; the longest row has {max(reading.lengths)} tokens")
    return "\n".join(lines)
