"""Parallel processes of a run, one per GPU.

To use several GPUs in another way, write a class with the methods of `DataParallel`. Training calls it to `shard` the
model, to `reduce` results of all processes, and to `gather` the state for a checkpoint.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from qlora.errors import RecipeError, UsageError, first_line
from qlora.recipe import Recipe
from qlora.runtime.allocators import grow_by_pages
from qlora.runtime.device import device_of
from qlora.runtime.launch import ADVICE, process_count
from qlora.runtime.rendezvous import awaiting

Result = TypeVar("Result")
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class DataParallel:
    """Data parallelism: every process has the whole model and computes its share of each step's micro-batches."""

    device: torch.device
    """device of this process"""
    rank: int = 0
    """number of this process; 0 is the main process"""
    count: int = 1
    """number of processes; 1 in an ordinary run"""

    @classmethod
    def of(cls, recipe: Recipe) -> "DataParallel":
        """Join the processes that `torchrun` or `accelerate launch` started.

        Raises:
            ModelError: torch cannot use the driver of the GPU.
            UsageError: the launcher's variables are wrong, or the processes cannot find each other.
            RecipeError: there is no device as in `training.device`, or several processes would share it.
        """
        grow_by_pages()
        expected, name = process_count(), recipe.training.device
        if ":" in name and expected > 1:
            raise RecipeError(
                f"training.device: {name} is one GPU, but this run has {expected} processes, and each takes the GPU "
                "of its own number. Set training.device=cuda, and choose the GPUs with CUDA_VISIBLE_DEVICES"
            )
        device = device_of(recipe)
        try:
            with awaiting(expected):
                accelerator = Accelerator(cpu=device.type == "cpu")
        except (ValueError, torch.distributed.DistError) as error:
            if expected == 1:
                raise
            raise UsageError(
                f"WORLD_SIZE is {expected}, but the processes cannot find each other: {first_line(error)}. {ADVICE}"
            ) from error
        if ":" not in name:
            device = accelerator.device
        elif device.type == "cuda":
            torch.cuda.set_device(device)  # accelerate may have selected the first one
        return cls(device, accelerator.process_index, accelerator.num_processes)

    @property
    def is_main(self) -> bool:
        """True if this process writes the files and prints to the terminal."""
        return self.rank == 0

    def shard(self, model: Model) -> Model:
        """Return this process's part of `model`: the whole model."""
        return model

    def reduce(self, tensors: Iterable[Tensor]) -> None:
        """Sum each tensor over all processes, in place. Each process has a part of the step's sum, not a mean."""
        if self.count > 1:
            for tensor in tensors:
                torch.distributed.all_reduce(tensor)

    def highest(self, number: int) -> int:
        """Return the highest of the numbers of all processes, so that all of them act on it together."""
        if self.count == 1:
            return number
        numbers = torch.tensor(number, device=self.device)
        torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MAX)
        return int(numbers.item())

    def gather(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the whole state on the main process, which has it already."""
        return state

    def from_main(self, find: Callable[[], Result]) -> Result:
        """Run `find` on the main process; broadcast its result, or raise its error, on every process."""
        if self.count == 1:
            return find()
        outcome: list[Any] = [None]
        if self.is_main:
            try:
                outcome = [find()]
            except ValueError as error:
                outcome = [error]
        broadcast_object_list(outcome)
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        result: Result = outcome[0]
        return result
