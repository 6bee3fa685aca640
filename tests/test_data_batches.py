"""Batches: each row once an epoch, any step on request, and sums that do not depend on the layout."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora.data import IGNORE_INDEX, Batch, Batches, Example

PAD = 0


def example(length: int, number: int) -> Example:
    """Return tokens 100 * (number + 1) + position, recognisable in any batch. The second half is trained."""
    ids = np.arange(length, dtype=np.int32) + 100 * (number + 1)
    labels = ids.copy()
    labels[: max(1, length // 2)] = IGNORE_INDEX
    return Example(ids, labels, f"rows.jsonl:{number + 1}")


@dataclass
class Case:
    examples: list[Example]
    arguments: dict[str, Any]

    @property
    def batches(self) -> Batches:
        return Batches(self.examples, **self.arguments)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    lengths = draw(st.lists(st.integers(2, 30), min_size=1, max_size=40))
    micro = draw(st.integers(1, 4))
    arguments = {
        "micro_batch_size": micro,
        "global_batch_size": micro * draw(st.integers(1, 4)),
        "max_length": draw(st.integers(30, 60)),
        "packing": draw(st.booleans()),
        "pad_id": PAD,
        "seed": draw(st.integers(0, 5)),
    }
    return Case([example(length, number) for number, length in enumerate(lengths)], arguments)


def documents(batch: Batch) -> list[list[int]]:
    """Return the documents of a batch, identified by the hundreds of their tokens."""
    found: dict[int, list[int]] = {}
    for token in batch.input_ids[batch.input_ids != PAD].tolist():
        found.setdefault(token // 100, []).append(token)
    return sorted(found.values())


def everything(batches: list[Batch]) -> list[list[int]]:
    return sorted(document for batch in batches for document in documents(batch))


@given(cases(), st.integers(0, 3))
@settings(deadline=None)
def test_every_row_comes_exactly_once_an_epoch(case: Case, epoch: int) -> None:
    batches = case.batches
    first = epoch * batches.steps_per_epoch
    seen = [batch for i in range(batches.steps_per_epoch) for batch in batches.step(first + i)]
    assert everything(seen) == sorted(one.input_ids.tolist() for one in case.examples)


@given(cases(), st.integers(0, 50))
@settings(deadline=None)
def test_a_step_does_not_depend_on_earlier_requests(case: Case, i: int) -> None:
    ours = case.batches
    for earlier in (i + 7, 0, i):
        ours.step(earlier)
    for ours_batch, fresh in zip(ours.step(i), case.batches.step(i), strict=True):
        assert torch.equal(ours_batch.input_ids, fresh.input_ids)
        assert torch.equal(ours_batch.labels, fresh.labels)


@given(cases())
@settings(deadline=None)
def test_sums_do_not_depend_on_the_micro_batch(case: Case) -> None:
    if case.arguments["packing"]:
        case.arguments["packing"] = False  # with packing, other rows make other steps
    single = Case(case.examples, {**case.arguments, "micro_batch_size": 1})
    for i in range(case.batches.steps_per_epoch):
        ours, ones = case.batches.step(i), single.batches.step(i)
        assert sum(batch.supervised for batch in ours) == sum(batch.supervised for batch in ones)
        assert sum(batch.tokens for batch in ours) == sum(batch.tokens for batch in ones)
        assert everything(ours) == everything(ones)


@given(cases())
@settings(deadline=None)
def test_counts_match_the_examples_in_every_layout(case: Case) -> None:
    seen = case.batches.evaluation()
    assert sum(batch.tokens for batch in seen) == sum(len(one.input_ids) for one in case.examples)
    trained = sum(int((one.labels != IGNORE_INDEX).sum()) for one in case.examples)
    assert sum(batch.supervised for batch in seen) == trained
    assert all(batch.supervised == int((batch.labels[:, 1:] != IGNORE_INDEX).sum()) for batch in seen)


@given(cases())
@settings(deadline=None)
def test_every_step_has_supervised_tokens_and_keeps_its_size(case: Case) -> None:
    batches = case.batches
    for i in range(batches.steps_per_epoch):
        step = batches.step(i)
        assert all(batch.supervised > 0 for batch in step)
        assert all(batch.input_ids.shape[0] <= batches.micro_batch_size for batch in step)
        rows = sum(batch.input_ids.shape[0] for batch in step)
        assert rows == batches.global_batch_size or i == batches.steps_per_epoch - 1
        assert all(batch.input_ids.shape[1] <= case.arguments["max_length"] for batch in step)


@given(cases())
@settings(deadline=None)
def test_positions_restart_with_every_document_and_labels_match_tokens(case: Case) -> None:
    by_number = {int(one.input_ids[0]) // 100: one for one in case.examples}
    for batch in case.batches.evaluation():
        if batch.position_ids is None:
            assert not case.arguments["packing"]
            continue
        for ids, positions, labels in zip(batch.input_ids, batch.position_ids, batch.labels, strict=True):
            start = 0
            while start < len(ids) and ids[start] != PAD:
                one = by_number[int(ids[start]) // 100]
                end = start + len(one.input_ids)
                assert positions[start:end].tolist() == list(range(end - start))
                assert ids[start:end].tolist() == one.input_ids.tolist()
                assert labels[start:end].tolist() == one.labels.tolist()
                start = end
            assert (ids[start:] == PAD).all()
            assert (labels[start:] == IGNORE_INDEX).all()
            assert positions[start:].tolist() == list(range(len(ids) - start))


def test_the_first_label_of_a_packed_document_is_never_learned() -> None:
    # else the last token of one document would learn to predict the next document
    whole = [
        Example(one.input_ids, one.input_ids.copy(), one.origin) for one in map(example, [5, 6, 7], range(3))
    ]
    arguments = {"micro_batch_size": 1, "global_batch_size": 1, "max_length": 20, "pad_id": PAD, "seed": 0}
    (batch,) = Batches(whole, packing=True, **arguments).evaluation()
    assert batch.position_ids is not None
    assert (batch.labels[batch.position_ids == 0] == IGNORE_INDEX).all()
    assert batch.supervised == 5 + 6 + 7 - 3


def test_padding_is_ignored_even_if_pad_is_a_trained_token() -> None:
    eos = 9
    rows = [Example(np.array([5, 6, eos], np.int32), np.array([-100, 6, eos], np.int32), "a:1")]
    rows.append(
        Example(np.array([5, 6, 7, 7, eos], np.int32), np.array([-100, -100, 7, 7, eos], np.int32), "a:2")
    )
    arguments = {"micro_batch_size": 2, "global_batch_size": 2, "max_length": 8, "seed": 0}
    (batch,) = Batches(rows, packing=False, pad_id=eos, **arguments).evaluation()
    assert batch.input_ids.tolist() == [[5, 6, eos, eos, eos], [5, 6, 7, 7, eos]]
    assert batch.labels.tolist() == [[-100, 6, eos, -100, -100], [-100, -100, 7, 7, eos]]
    assert (batch.tokens, batch.supervised) == (8, 5)


def test_rows_of_a_step_are_grouped_by_length_longest_first() -> None:
    rows = [example(length, number) for number, length in enumerate([3, 30, 4, 29, 5, 28, 6, 27])]
    arguments = {"micro_batch_size": 4, "global_batch_size": 8, "max_length": 30, "pad_id": PAD, "seed": 0}
    long, short = Batches(rows, packing=False, **arguments).step(0)
    assert (long.input_ids != PAD).sum(1).tolist() == [30, 29, 28, 27]
    assert (short.input_ids != PAD).sum(1).tolist() == [6, 5, 4, 3]


def test_epochs_differ_and_seeds_differ() -> None:
    rows = [example(10, number) for number in range(64)]
    arguments = {
        "micro_batch_size": 4,
        "global_batch_size": 8,
        "max_length": 30,
        "packing": False,
        "pad_id": PAD,
    }
    one, other = Batches(rows, seed=1, **arguments), Batches(rows, seed=2, **arguments)
    assert one.step_rows(0) != one.step_rows(one.steps_per_epoch)
    assert one.step_rows(0) != other.step_rows(0)


def test_no_rows_make_no_batches() -> None:
    arguments = {"micro_batch_size": 2, "global_batch_size": 2, "max_length": 30, "pad_id": PAD, "seed": 0}
    for packing in (True, False):
        empty = Batches([], packing=packing, **arguments)
        assert empty.evaluation() == []
        assert empty.steps_per_epoch == 0
