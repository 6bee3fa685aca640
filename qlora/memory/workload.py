"""The largest batches of a run, which decide its peak memory."""

from dataclasses import dataclass, replace

import torch

from qlora.data import IGNORE_INDEX, Batch, Batches, Dataset, held_out_batches, training_batches
from qlora.memory.architecture import Architecture
from qlora.recipe import Recipe


@dataclass(frozen=True)
class Workload:
    """The batches of a forecast."""

    train: Batch
    evaluation: Batch | None
    basis: str
    """source of the shapes, as text"""
    step: int = 0
    """the optimizer step (0-based) that has `train`"""
    densest: Batch | None = None
    """the micro-batch with the most trained tokens, if it has more than `train`: its logits can take more memory"""
    densest_step: int = 0
    """the optimizer step (0-based) that has `densest`"""


def of_run(
    recipe: Recipe, dataset: Dataset, batches: Batches, steps: int, arch: Architecture | None
) -> Workload:
    """Find the largest micro-batches of a run's steps and of its evaluations.

    Args:
        recipe: the recipe.
        dataset: its data.
        batches: the training batches of the run.
        steps: number of optimizer steps.
        arch: architecture of the base. If None, padding counts and the densest micro-batch is not determined.
    """
    padded = arch is None or arch.padded
    loss_chunk = 0 if arch is None else arch.loss_chunk(recipe)
    held_out = held_out_batches(dataset, recipe) if dataset.held_out else []
    step, train = batches.largest(steps, padded=padded)
    densest_step, densest = batches.densest(steps, padded=padded, enough=loss_chunk)
    denser = densest.supervised > train.supervised < loss_chunk

    def size(batch: Batch) -> int:
        return batch.input_ids.numel() if padded else batch.tokens

    return Workload(
        train=train,
        evaluation=max(held_out, key=size, default=None),
        basis="the longest rows of the data",
        step=step,
        densest=densest if denser else None,
        densest_step=densest_step if denser else step,
    )


def of_epoch(recipe: Recipe, dataset: Dataset, arch: Architecture) -> Workload:
    """Find the largest micro-batches of a whole epoch, so that a plan also fits if a resumed run takes more steps."""
    batches = training_batches(dataset, recipe)
    return of_run(recipe, dataset, batches, batches.steps_per_epoch, arch)


def assumed(recipe: Recipe) -> Workload:
    """Return full rows with every token trained: the upper limit of the recipe for any data."""
    shape = (recipe.training.micro_batch_size, recipe.data.max_length)
    input_ids = torch.zeros(shape, dtype=torch.int64)  # [B, T]
    labels = torch.zeros(shape, dtype=torch.int64)
    labels[:, 0] = IGNORE_INDEX
    positions, documents = None, None
    if recipe.data.packing:
        halves = -(shape[1] // -2), shape[1] // 2  # packing puts several documents into a row
        positions = torch.cat([torch.arange(half) for half in halves]).repeat(shape[0], 1)
        documents = (halves,) * shape[0]
    supervised = shape[0] * (shape[1] - 1)
    batch = Batch(input_ids, labels, positions, input_ids.numel(), supervised, documents)
    return Workload(
        train=batch,
        evaluation=None if recipe.data.held_out == 0 else batch,
        basis=f"assumed: every row has {shape[1]} tokens, all trained; the data was not read",
    )


def resized(workload: Workload, *, rows: int | None = None, tokens: int | None = None) -> Workload:
    """Return the workload with micro-batches of `rows` rows of `tokens` tokens, the same share of them trained.

    An evaluation whose batches are not larger than the training batches is dropped: it never has the peak.
    """

    def batch(old: Batch) -> Batch:
        before = old.input_ids.shape
        shape = rows or before[0], tokens or before[1]
        input_ids = torch.zeros(shape, dtype=torch.int64)
        positions, documents = None, None
        if old.position_ids is not None and old.documents is not None:
            documents = (_repeated(old.documents[0], shape[1]),) * shape[0]
            positions = torch.cat([torch.arange(length) for length in documents[0]]).repeat(shape[0], 1)
        supervised = max(1, old.supervised * input_ids.numel() // old.input_ids.numel())
        labels = torch.full(shape, IGNORE_INDEX)
        labels.view(-1)[:supervised] = 0
        return Batch(input_ids, labels, positions, input_ids.numel(), supervised, documents)

    old = workload.evaluation
    larger = old is not None and old.input_ids.numel() > workload.train.input_ids.numel()
    evaluation = batch(old) if old is not None and larger else None
    densest = workload.densest and batch(workload.densest)
    return replace(workload, train=batch(workload.train), evaluation=evaluation, densest=densest)


def _repeated(lengths: tuple[int, ...], tokens: int) -> tuple[int, ...]:
    """Repeat the document lengths of one row until they sum to `tokens`."""
    repeated: list[int] = []
    while (left := tokens - sum(repeated)) > 0:
        repeated.append(min(lengths[len(repeated) % len(lengths)], left))
    return tuple(repeated)
