"""Groups examples into the micro-batches of each optimizer step, as padded or packed tensors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qlora.data.examples import IGNORE_INDEX as IGNORE_INDEX
from qlora.data.examples import Example as Example
from qlora.data.examples import Examples
from qlora.data.mixture import Share, epoch_rows
from qlora.data.order import permutation
from qlora.data.packing import best_fit

LARGEST_WITHIN = 3
"""least number of epochs searched for the largest micro-batch"""


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch: B rows, padded on the right to the T tokens of the longest row."""

    input_ids: Tensor  # int64 [B, T]
    labels: Tensor  # int64 [B, T], aligned with input_ids (the loss shifts them)
    position_ids: Tensor | None
    """int64 [B, T] if packed: restarts at 0 at every document and at the padding"""
    tokens: int
    """number of tokens without padding"""
    supervised: int
    """number of labels in the loss: not IGNORE_INDEX, and not the first of a document, which nothing predicts"""
    documents: tuple[tuple[int, ...], ...] | None = None
    """length of each document of each row, in tokens; None: every row is one document without padding"""

    @property
    def plain(self) -> bool:
        """True if every row is one document without padding."""
        width = self.input_ids.shape[1]
        return self.documents is None or all(row == (width,) for row in self.documents)

    @property
    def row_lengths(self) -> list[int]:
        """Number of tokens in each row, without padding."""
        if self.documents is None:
            return [self.input_ids.shape[1]] * len(self.input_ids)
        return [sum(row) for row in self.documents]

    def end_to_end(self, multiple: int = 1) -> tuple["Batch", tuple[int, ...]]:
        """Join all documents into one row without padding.

        If needed, a last document of token 0 extends the row to a multiple of `multiple` tokens. It is not trained.

        Returns:
            The batch of one row, and the length of each document in tokens.
        """
        rows = self.documents or ((self.input_ids.shape[1],),) * len(self.input_ids)
        ends = [sum(row) for row in rows]
        lengths = [length for row in rows for length in row]
        if filler := -sum(ends) % multiple:
            lengths.append(filler)

        def joined(tensor: Tensor, fill: int) -> Tensor:
            parts = [row[:end] for row, end in zip(tensor, ends, strict=True)]
            return torch.cat([*parts, tensor.new_full((filler,), fill)])[None]

        batch = replace(
            self,
            input_ids=joined(self.input_ids, 0),
            labels=joined(self.labels, IGNORE_INDEX),
            position_ids=None,
            documents=None,
        )
        return batch, tuple(lengths)


class Batches:
    """All optimizer steps over a list of examples.

    A row is one example or, with `packing`, several. Every row is used exactly once an epoch, unless `mixture` says
    otherwise. Step i is a pure function of (examples, arguments, i), so steps can be built in any order.

    Args:
        examples: each has 1..max_length tokens, at least one of them supervised.
        micro_batch_size: rows per forward and backward pass.
        global_batch_size: rows per optimizer step, a multiple of micro_batch_size. The last step of an
            epoch takes the rows that are left.
        max_length: upper limit of a row in tokens.
        packing: put several examples into a row. The packing is the same in every epoch.
        pad_id: token used as padding. Padding is never trained, even if this token has another meaning.
        seed: seed of the row order.
        mixture: the shares of several sources, whose examples follow each other; empty: an epoch has all rows. With
            `packing`, a row has examples of one source only, and the shares are those of packed rows.

    Examples:
        >>> batches = Batches(dataset.train, micro_batch_size=4, global_batch_size=16, max_length=512,
        ...                   packing=True, pad_id=dataset.pad_id, seed=0)
        >>> for step in range(batches.steps_per_epoch):
        ...     for batch in batches.step(step): ...
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        micro_batch_size: int,
        global_batch_size: int,
        max_length: int,
        packing: bool,
        pad_id: int,
        seed: int,
        mixture: Sequence[Share] = (),
    ) -> None:
        assert global_batch_size % micro_batch_size == 0
        self.examples = Examples.of(examples)
        self.micro_batch_size = micro_batch_size
        self.global_batch_size = global_batch_size
        self.packing = packing
        self.pad_id = pad_id
        self.seed = seed
        lengths = self.examples.lengths.tolist()
        self.rows: list[list[int]] = []
        """indices into `examples`, per row"""
        self._shares: list[Share] = []
        start = 0
        for share in mixture or [Share(len(lengths), len(lengths))]:
            stop = start + share.total
            packed = (
                best_fit(lengths[start:stop], max_length) if packing else [[i] for i in range(share.total)]
            )
            self.rows += [[start + index for index in row] for row in packed]
            self._shares.append(share.of_packed(len(packed)))
            start = stop
        assert start == len(lengths)
        self._row_lengths = [sum(lengths[index] for index in row) for row in self.rows]
        # A cache, not state: the order is a function of the epoch.
        self._order = lru_cache(maxsize=2)(self._order_of)

    def _order_of(self, epoch: int) -> list[int]:
        rows = epoch_rows(self._shares, self.seed, epoch)
        order: list[int] = rows[permutation(len(rows), self.seed, epoch)].tolist()
        return order

    @property
    def rows_per_epoch(self) -> int:
        """Number of rows that an epoch uses; a row that it uses twice counts twice."""
        return sum(share.per_epoch for share in self._shares)

    @property
    def steps_per_epoch(self) -> int:
        """Number of optimizer steps of an epoch."""
        return -(-self.rows_per_epoch // self.global_batch_size)

    def step(self, i: int) -> list[Batch]:
        """Return the micro-batches of optimizer step i (0-based, counted over all epochs), longest rows first.

        Rows of similar length share a micro-batch, which keeps padding small. A step that does not fit into
        memory fails in its first micro-batch. The gradient sum of the step does not depend on this order.
        """
        return [self._collate(rows) for rows in self.step_rows(i)]

    def step_rows(self, i: int) -> list[list[int]]:
        """Return the row numbers (indices into `rows`) of each micro-batch of optimizer step i."""
        epoch, within = divmod(i, self.steps_per_epoch)
        start = within * self.global_batch_size
        chosen = self._order(epoch)[start : start + self.global_batch_size]
        return self._split(sorted(chosen, key=lambda row: (-self._row_lengths[row], row)))

    def largest(self, steps: int, *, padded: bool) -> tuple[int, Batch]:
        """Find the micro-batch with the most tokens in the first `steps` steps.

        Args:
            steps: number of steps to search; the search ends after LARGEST_WITHIN epochs, or later if not all rows have
                been used by then.
            padded: count padding tokens too.

        Returns:
            The step number and the micro-batch.
        """
        return self._most(steps, lambda rows: self._tokens(rows, padded=padded))

    def densest(self, steps: int, *, padded: bool, enough: int) -> tuple[int, Batch]:
        """Find the micro-batch with the most supervised tokens; arguments and result as in `largest`.

        Supervised counts above `enough` are equal; among equals, the micro-batch with the most tokens wins.
        """

        def density(rows: Sequence[int]) -> tuple[int, int]:
            supervised = sum(self._row_supervised[row] for row in rows)
            return min(supervised, enough), self._tokens(rows, padded=padded)

        return self._most(steps, density)

    def _most(self, steps: int, weigh: Callable[[Sequence[int]], Any]) -> tuple[int, Batch]:
        epochs = max(LARGEST_WITHIN, *(-(-share.total // max(1, share.per_epoch)) for share in self._shares))
        seen = range(min(steps, self.steps_per_epoch * epochs))
        step, rows = max(
            ((step, rows) for step in seen for rows in self.step_rows(step)),
            key=lambda candidate: weigh(candidate[1]),
        )
        return step, self._collate(rows)

    def _tokens(self, rows: Sequence[int], *, padded: bool) -> int:
        lengths = [self._row_lengths[row] for row in rows]
        return len(lengths) * max(lengths) if padded else sum(lengths)

    @cached_property
    def _row_supervised(self) -> list[int]:
        """Number of supervised tokens in each row; the first token of a document is never predicted."""
        counts = self.examples.supervised.tolist()
        return [sum(counts[index] for index in row) for row in self.rows]

    def evaluation(self) -> list[Batch]:
        """Return micro-batches that cover all rows once, in order."""
        return [self._collate(rows) for rows in self._split(range(len(self.rows)))]

    def _split(self, rows: Sequence[int]) -> list[list[int]]:
        size = self.micro_batch_size
        return [list(rows[start : start + size]) for start in range(0, len(rows), size)]

    def _collate(self, rows: Sequence[int]) -> Batch:
        documents = [[self.examples[index] for index in self.rows[row]] for row in rows]
        return collate(documents, pad_id=self.pad_id, packed=self.packing)


def collate(rows: Sequence[Sequence[Example]], *, pad_id: int, packed: bool) -> Batch:
    """Build one batch from rows of documents, padded to the longest row.

    Without `packed` every row is one document. Positions are then None, because models count from 0 by default.
    """
    assert packed or all(len(row) == 1 for row in rows)
    width = max(sum(len(document.input_ids) for document in row) for row in rows)
    input_ids = np.full((len(rows), width), pad_id, dtype=np.int64)  # [B, T]
    labels = np.full((len(rows), width), IGNORE_INDEX, dtype=np.int64)  # [B, T]
    positions = np.empty((len(rows), width), dtype=np.int64)  # [B, T]
    tokens = 0
    for number, row in enumerate(rows):
        end = 0
        for document in row:
            start, end = end, end + len(document.input_ids)
            input_ids[number, start:end] = document.input_ids
            labels[number, start:end] = document.labels
            labels[number, start] = IGNORE_INDEX  # no token of the document predicts its first token
            positions[number, start:end] = np.arange(end - start)
        positions[number, end:] = np.arange(width - end)  # padding counts as a separate document
        tokens += end
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(positions) if packed else None,
        tokens=tokens,
        supervised=int((labels != IGNORE_INDEX).sum()),
        documents=tuple(tuple(len(document.input_ids) for document in row) for row in rows),
    )
