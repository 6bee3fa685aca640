"""Dropout by row: the same masks for any micro-batch, padding, piece and process."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from test_step import adapted, assert_same, padded, rows
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qlora.adapter import trainable_parameters
from qlora.data import Batch
from qlora.data.batches import Example, collate
from qlora.model.checkpointing import checkpoint_layers
from qlora.model.decoder_layer import use_fused_layers
from qlora.objective.causal_lm import CausalLM, loss_sum
from qlora.objective.objective import Loss
from qlora.objective.step import CAUSAL_LM, accumulate
from qlora.ops import dropout
from qlora.ops.dropout import Dropout, Rows
from qlora.runtime.fake import FakeTensors

HIDDEN = 5


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dropout, "PIECE", 16)
    monkeypatch.setattr(dropout, "CHUNK", 6)


def alone(row: int, length: int) -> Tensor:
    """Return the mask [length, HIDDEN] of a single row."""
    return Dropout(0.5, 7, Rows(row, (0,), (length,), length)).mask(torch.empty(length, HIDDEN))


@pytest.mark.usefixtures("_small_pieces")
@example(lengths=[30, 1, 17], padding=3, first=2)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    padding=st.integers(0, 9),
    first=st.integers(0, 100),
)
def test_a_row_has_the_same_mask_in_any_position(lengths: Sequence[int], padding: int, first: int) -> None:
    each = [alone(first + number, length) for number, length in enumerate(lengths)]
    ends = [sum(lengths[: number + 1]) for number in range(len(lengths))]
    starts = tuple(end - length for end, length in zip(ends, lengths, strict=True))
    end_to_end = Dropout(0.5, 7, Rows(first, starts, tuple(lengths), ends[-1] + padding))
    mask = end_to_end.mask(torch.empty(ends[-1] + padding, HIDDEN))
    assert torch.equal(mask, torch.cat([*each, torch.ones(padding, HIDDEN, dtype=torch.bool)]))
    pieces = [
        end_to_end.of_piece(number, len(mask)).mask(part)
        for number, part in enumerate(torch.empty(len(mask), HIDDEN).split(16))
    ]
    assert torch.equal(torch.cat(pieces), mask)
    width = max(lengths) + padding
    starts = tuple(number * width for number in range(len(lengths)))
    in_rows = Dropout(0.5, 7, Rows(first, starts, tuple(lengths), width * len(lengths)))
    for row, wanted in zip(
        in_rows.mask(torch.empty(width * len(lengths), HIDDEN)).split(width), each, strict=True
    ):
        assert torch.equal(row[: len(wanted)], wanted)
        assert row[len(wanted) :].all()


def test_masks_differ_from_row_to_row_and_have_the_rate() -> None:
    masks = [alone(row, 4000) for row in range(3)]
    assert all((mask.float().mean() - 0.5).abs() < 0.02 for mask in masks)
    assert all(0.45 < (one == other).float().mean() < 0.55 for one, other in itertools.pairwise(masks))


class Calls(TorchDispatchMode):
    """Counts torch's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_a_forecast_takes_no_longer_for_more_rows() -> None:
    def operations(rows: int) -> int:
        lengths = (4,) * rows
        mask = Dropout(0.5, 7, Rows(0, tuple(range(0, 4 * rows, 4)), lengths, 4 * rows))
        with FakeTensors(cuda=True).made() as fake:
            x = fake(torch.empty(4 * rows, HIDDEN))
            with Calls() as calls:
                mask.mask(x)
        return calls.count

    assert operations(200) == operations(2)


def test_without_known_rows_a_mask_is_still_repeatable() -> None:
    x = torch.empty(30, HIDDEN)
    with dropout.masks_by_row(1, 0):
        drawn = dropout.draw(0.5, 3)
        assert drawn is not None
        for part, length in ((drawn, 30), (drawn.of_piece(0, 30), 16), (drawn.of_piece(1, 30), 14)):
            masks = [part.mask(x[:length]) for _ in range(2)]
            assert torch.equal(*masks)
            assert 0.3 < masks[0].float().mean() < 0.7


class Difference(CausalLM):
    """Runs two forward passes before the backward, as an objective that compares answers does."""

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        other = replace(batch, input_ids=batch.input_ids[:, :7], labels=batch.labels[:, :7], supervised=5)
        return Loss(loss_sum(model, batch) - loss_sum(model, other))


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_recompute_draws_the_masks_of_its_own_forward_pass(name: str) -> None:
    model = adapted(name, dropout=0.4)
    use_fused_layers(model)
    batches = [padded(rows([14, 14]))]
    checkpoint_layers(model, 0)
    plain = gradients(model, batches, Difference())
    checkpoint_layers(model)
    assert_same(gradients(model, batches, Difference()), plain)


def gradients(
    model: Any, batches: Sequence[Any], objective: CausalLM = CAUSAL_LM, **kwargs: int
) -> dict[str, Tensor]:
    model.zero_grad()
    accumulate(model, batches, objective, seed=3, step=5, **kwargs)
    return {n: p.grad.clone() for n, p in trainable_parameters(model).items() if p.grad is not None}


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_gradients_with_dropout_do_not_depend_on_the_micro_batch(name: str) -> None:
    model = adapted(name, dropout=0.4)
    made = rows([14, 14, 14, 14])
    wanted = gradients(model, [padded(made)])
    for size in (1, 2):
        batches = [padded(made[start : start + size]) for start in range(0, 4, size)]
        assert_same(gradients(model, batches), wanted)
        shares = [gradients(model, batches, rank=rank, processes=2) for rank in (0, 1)]
        assert_same({n: shares[0][n] + shares[1][n] for n in wanted}, wanted)
    model.zero_grad()
    other = gradients(model, [padded([*made[1:], made[0]])])
    with pytest.raises(AssertionError):
        assert_same(other, wanted)


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_with_dropout_do_not_depend_on_padding_and_packing(packed: bool) -> None:
    model = adapted("llama", dropout=0.4)
    made = [
        Example(ids.numpy().astype("int32"), labels.numpy().astype("int32"), "")
        for ids, labels in rows([19, 12, 9, 5, 4, 3])
    ]
    documents = [made[:2], made[2:4], made[4:]] if packed else [[one] for one in made]
    wanted = gradients(model, [collate(documents, pad_id=0, packed=packed)])
    alone = [collate([row], pad_id=0, packed=packed) for row in documents]
    assert_same(gradients(model, alone), wanted)
