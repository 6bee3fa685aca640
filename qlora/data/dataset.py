"""Turns a recipe's `data` section into training examples, held-out examples and row counts."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from qlora.data.batches import IGNORE_INDEX, Batch, Batches, Example
from qlora.data.encoding import Encoder
from qlora.data.layout import Layout
from qlora.data.order import SPLIT, permutation
from qlora.data.packing import best_fit
from qlora.data.reading import Reading, read_examples
from qlora.errors import DataError
from qlora.formats import Completion, Conversation
from qlora.recipe import Data, Recipe


class Prompt(NamedTuple):
    """A held-out row as a prompt for generation."""

    input_ids: list[int]
    text: str
    """the question, without the template around it"""
    reference: str
    """the answer in the data"""
    origin: str


@dataclass(frozen=True)
class Counts:
    """Row counts by outcome: read + split = bad + dropped + unsupervised + train + held_out."""

    read: int
    split: int
    """documents beyond the first of their row, for rows that give several"""
    bad: int
    """unusable rows, skipped (`on_bad_row: skip`)"""
    dropped: int
    """rows longer than max_length, left out (`too_long: drop`)"""
    truncated: int
    """rows longer than max_length, cut (`too_long: truncate`); also counted in train, held_out or unsupervised"""
    unsupervised: int
    """rows without a trained token, left out; usually the prompt alone fills max_length"""
    train: int
    held_out: int
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


@dataclass(frozen=True)
class Dataset:
    """Training rows and held-out rows of a run. No row is in both."""

    train: list[Example]
    held_out: list[Example]
    prompts: list[Prompt]
    """one per held-out row"""
    counts: Counts
    fingerprint: str
    """SHA-256 of all token ids and labels in order; equal only if a run sees the same data"""
    pad_id: int
    """padding token; padding is never trained, even if this token has another meaning"""
    stop_ids: frozenset[int]
    """tokens that end an answer"""


def make_dataset(section: Data, tokenizer: PreTrainedTokenizerFast, seed: int) -> Dataset:
    """Read, render, tokenise and split the rows of a `data` section. Arguments and errors as in `load_dataset`."""
    layout = Layout(section, tokenizer)
    encoder = layout.encoder
    readings = [read_examples(section, section.source, layout, encoder, section.limit)]
    if isinstance(section.held_out, str):
        readings.append(read_examples(section, section.held_out, layout, encoder))
    for reading in readings:
        if not reading.examples:
            raise DataError(_nothing_left(reading))
    examples, contents = readings[0].examples, readings[-1].contents
    if isinstance(section.held_out, str):
        train, held_out = examples, readings[1].examples
    else:
        chosen = _held_out(len(examples), section.held_out, seed)
        train = [example for index, example in enumerate(examples) if index not in chosen]
        held_out = [examples[index] for index in sorted(chosen)]
        contents = [contents[index] for index in sorted(chosen)]
    return Dataset(
        train=train,
        held_out=held_out,
        prompts=_prompts(held_out, contents, layout, encoder),
        counts=_counts(readings, train, held_out, section),
        fingerprint=_fingerprint(train, held_out),
        pad_id=next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0),
        stop_ids=layout.answer_ends,
    )


def training_batches(dataset: Dataset, recipe: Recipe) -> Batches:
    """Return the optimizer steps over the training rows, with the batch sizes of the recipe."""
    return _batches(dataset.train, dataset, recipe)


def held_out_batches(dataset: Dataset, recipe: Recipe) -> list[Batch]:
    """Return all held-out rows once, in micro-batches of the recipe's size."""
    return _batches(dataset.held_out, dataset, recipe).evaluation()


def _batches(examples: list[Example], dataset: Dataset, recipe: Recipe) -> Batches:
    return Batches(
        examples,
        micro_batch_size=recipe.training.micro_batch_size,
        global_batch_size=recipe.training.global_batch_size,
        max_length=recipe.data.max_length,
        packing=recipe.data.packing,
        pad_id=dataset.pad_id,
        seed=recipe.training.seed,
    )


def _held_out(rows: int, held_out: int | float, seed: int) -> set[int]:
    """Choose the held-out row numbers, by count or by share. A share is rounded to at least one row on each side."""
    if isinstance(held_out, int):
        if held_out >= rows:
            raise DataError(
                f"data.held_out: cannot hold out {held_out} rows, because only {rows} rows are usable and at least "
                "one must remain for training; set a smaller number"
            )
        wanted = held_out
    else:
        wanted = min(max(1, round(rows * held_out)), rows - 1)
    return set(permutation(rows, seed, SPLIT)[:wanted].tolist())


def _prompts(
    examples: Sequence[Example],
    contents: Sequence[Conversation | Completion],
    layout: Layout,
    encoder: Encoder,
) -> list[Prompt]:
    questions = [layout.question(content) for content in contents]
    encoded = encoder.encode([question.document for question in questions])
    return [
        Prompt(tokens.input_ids.tolist(), question.text, question.reference, example.origin)
        for example, question, tokens in zip(examples, questions, encoded, strict=True)
    ]


def _counts(
    readings: Sequence[Reading], train: Sequence[Example], held_out: Sequence[Example], section: Data
) -> Counts:
    lengths = [len(row.input_ids) for row in train]
    packed_rows = len(best_fit(lengths, section.max_length)) if section.packing else 0
    seen = {row.input_ids.tobytes() for row in train}
    reasons: Counter[str] = sum((reading.reasons for reading in readings), Counter())
    return Counts(
        read=sum(reading.read for reading in readings),
        split=sum(reading.split for reading in readings),
        bad=reasons.total(),
        dropped=sum(reading.dropped for reading in readings),
        truncated=sum(reading.truncated for reading in readings),
        unsupervised=sum(reading.unsupervised for reading in readings),
        train=len(train),
        held_out=len(held_out),
        held_out_seen=sum(row.input_ids.tobytes() in seen for row in held_out),
        tokens=sum(lengths),
        supervised=sum(int((row.labels != IGNORE_INDEX).sum()) for row in train),
        packing_efficiency=sum(lengths) / (packed_rows * section.max_length) if packed_rows else None,
        reasons=dict(reasons.most_common()),
        tallies=dict(sum((reading.tallies for reading in readings), Counter()).most_common()),
    )


def _fingerprint(train: Sequence[Example], held_out: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for rows in (train, held_out):
        digest.update(len(rows).to_bytes(8, "little"))
        for row in rows:
            # the length first, so that different splits of the same tokens differ; little-endian on every machine
            digest.update(len(row.input_ids).to_bytes(8, "little"))
            digest.update(np.concatenate(row[:2]).astype("<i4").tobytes())
    return digest.hexdigest()


def _nothing_left(reading: Reading) -> str:
    outcomes = {
        "bad": len(reading.bad),
        "longer than data.max_length": reading.dropped,
        "without a trained token": reading.unsupervised,
    }
    if not reading.read:
        return f"{reading.source}: the source has no rows. Set data.source or data.held_out to a source with rows"
    counts = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items() if count)
    advice = ["set data.on_bad_row=error to see what is wrong with the bad rows"] if reading.bad else []
    if reading.dropped or reading.unsupervised:
        advice.append("raise data.max_length")
    return f"{reading.source}: none of {reading.read} rows can be used: {counts}; {' and '.join(advice)}"
