"""A recipe's `data` section -> examples to train on, examples held out, and counts of what was left out."""

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
from qlora.data.prompts import answer_ends
from qlora.data.reading import Reading, read_examples
from qlora.errors import DataError
from qlora.formats import Completion, Conversation
from qlora.recipe import Data, Recipe


class Prompt(NamedTuple):
    """A held-out row as generation poses it."""

    input_ids: list[int]
    text: str
    """what was asked, without the template around it"""
    reference: str
    """the data's own answer"""
    origin: str


@dataclass(frozen=True)
class Counts:
    """What became of the rows: read = bad + dropped + unsupervised + train + held_out."""

    read: int
    bad: int
    """could not be used and were skipped (`on_bad_row: skip`)"""
    dropped: int
    """longer than max_length and left out (`too_long: drop`)"""
    truncated: int
    """longer than max_length and cut (`too_long: truncate`); counted once more by where they ended up"""
    unsupervised: int
    """left out because no trained token is in them, mostly as the prompt alone fills max_length"""
    train: int
    held_out: int
    held_out_seen: int
    """held-out rows whose very tokens are also those of a training row"""
    untrained_answers: int
    """answers within kept rows that are context only (see `Renderer.document`)"""
    spelled_controls: int
    """kept rows whose text spells a control token, as "</s>"; it is ordinary text there"""
    tokens: int
    """of the training rows"""
    supervised: int
    """trained tokens of the training rows"""
    packing_efficiency: float | None
    """share of real tokens in the training rows, packed and padded to max_length; None without packing"""
    reasons: dict[str, int]
    """the bad rows by reason"""


@dataclass(frozen=True)
class Dataset:
    """What a run learns from and what it is judged by. The two share no row."""

    train: list[Example]
    held_out: list[Example]
    prompts: list[Prompt]
    """one for every held-out row"""
    counts: Counts
    fingerprint: str
    """SHA-256 over all token ids and labels in order: equal exactly if a run would see the same"""
    pad_id: int
    """fills rows up; never trained on, whatever else it means"""
    stop_ids: frozenset[int]
    """tokens that end an answer"""


def make_dataset(section: Data, tokenizer: PreTrainedTokenizerFast, seed: int) -> Dataset:
    """Read, lay out, encode and split the rows of a `data` section. Arguments and errors as of `load_dataset`."""
    encoder = Encoder(tokenizer)
    layout = Layout(section, tokenizer, encoder)
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
        stop_ids=answer_ends(layout, encoder),
    )


def training_batches(dataset: Dataset, recipe: Recipe) -> Batches:
    """The steps over the training rows, in batches as the recipe sizes them."""
    return _batches(dataset.train, dataset, recipe)


def held_out_batches(dataset: Dataset, recipe: Recipe) -> list[Batch]:
    """All held-out rows once, in micro-batches as the recipe sizes them."""
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
    """Which of so many rows are held out. A share is rounded; both sides get a row."""
    if isinstance(held_out, int):
        if held_out >= rows:
            raise DataError(
                f"data.held_out: {held_out} rows are to be held out, but only {rows} can be used and "
                "some must be left to train on; hold out fewer"
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
        bad=reasons.total(),
        dropped=sum(reading.dropped for reading in readings),
        truncated=sum(reading.truncated for reading in readings),
        unsupervised=sum(reading.unsupervised for reading in readings),
        train=len(train),
        held_out=len(held_out),
        held_out_seen=sum(row.input_ids.tobytes() in seen for row in held_out),
        untrained_answers=sum(reading.untrained_answers for reading in readings),
        spelled_controls=sum(reading.spelled_controls for reading in readings),
        tokens=sum(lengths),
        supervised=sum(int((row.labels != IGNORE_INDEX).sum()) for row in train),
        packing_efficiency=sum(lengths) / (packed_rows * section.max_length) if packed_rows else None,
        reasons=dict(reasons.most_common()),
    )


def _fingerprint(train: Sequence[Example], held_out: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for rows in (train, held_out):
        digest.update(len(rows).to_bytes(8, "little"))
        for row in rows:
            # the length first, so that no two lists run together; little-endian, whatever the machine
            digest.update(len(row.input_ids).to_bytes(8, "little"))
            digest.update(np.concatenate(row[:2]).astype("<i4").tobytes())
    return digest.hexdigest()


def _nothing_left(reading: Reading) -> str:
    fates = {
        "bad": len(reading.bad),
        "longer than data.max_length": reading.dropped,
        "without a trained token": reading.unsupervised,
    }
    found = ", ".join(f"{count} {fate}" for fate, count in fates.items() if count)
    if not reading.read:
        return f"{reading.source}: there are no rows in it"
    return f"{reading.source}: of {reading.read} rows none can be used: {found}"
