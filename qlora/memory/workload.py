"""The batches that decide what memory a run takes: its largest."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qlora.data import IGNORE_INDEX, Batch, Batches, Dataset, held_out_batches
from qlora.recipe import Recipe


@dataclass(frozen=True)
class Workload:
    """What a forecast runs."""

    train: Batch
    evaluation: Batch | None
    basis: str
    """where the shapes come from, in words"""
    step: int = 0
    """the optimizer step (0-based) that has `train` first"""


def of_run(recipe: Recipe, dataset: Dataset, batches: Batches, steps: int) -> Workload:
    """The largest micro-batch of a run's steps and of its evaluations."""
    held_out = held_out_batches(dataset, recipe) if dataset.held_out else []
    step, train = batches.largest(steps)
    return Workload(
        train=train,
        evaluation=max(held_out, key=lambda batch: batch.input_ids.numel(), default=None),
        basis="the longest rows of the data",
        step=step,
    )


def assumed(recipe: Recipe) -> Workload:
    """Full rows, every token of them trained: the most that the recipe allows, whatever the data."""
    shape = (recipe.training.micro_batch_size, recipe.data.max_length)
    input_ids = torch.zeros(shape, dtype=torch.int64)  # [B, T]
    labels = torch.zeros(shape, dtype=torch.int64)
    labels[:, 0] = IGNORE_INDEX
    positions = torch.arange(shape[1]).repeat(shape[0], 1) if recipe.data.packing else None
    supervised = shape[0] * (shape[1] - 1)
    batch = Batch(input_ids, labels, positions, tokens=input_ids.numel(), supervised=supervised)
    return Workload(
        train=batch,
        evaluation=None if recipe.data.held_out == 0 else batch,
        basis=f"assumed: every row has {shape[1]} tokens, all trained; the data was not read",
    )


def resized(workload: Workload, *, rows: int | None = None, tokens: int | None = None) -> Workload:
    """The same load with other micro-batches: `rows` rows of `tokens` tokens, the same share of them trained.

    An evaluation on batches no larger than those trained on never takes the most, and is left out.
    """

    def batch(old: Batch) -> Batch:
        before = old.input_ids.shape
        shape = rows or before[0], tokens or before[1]
        input_ids = torch.zeros(shape, dtype=torch.int64)
        positions = None if old.position_ids is None else _repeated(old.position_ids[:1], shape)
        supervised = max(1, old.supervised * input_ids.numel() // old.input_ids.numel())
        labels = torch.full(shape, IGNORE_INDEX)
        labels.view(-1)[:supervised] = 0
        return Batch(input_ids, labels, positions, tokens=input_ids.numel(), supervised=supervised)

    old = workload.evaluation
    larger = old is not None and old.input_ids.numel() > workload.train.input_ids.numel()
    evaluation = batch(old) if old is not None and larger else None
    return replace(workload, train=batch(workload.train), evaluation=evaluation)


def _repeated(positions: Tensor, shape: tuple[int, int]) -> Tensor:
    """[B, T]: the documents of one row, over and over."""
    times = -(-shape[1] // positions.shape[1])
    return positions.repeat(1, times)[:, : shape[1]].repeat(shape[0], 1)
