"""The processes of a run, one a GPU: what each holds of the model, and what they add up or agree on.

This is the seam for using several GPUs in another way: a class with the methods of `DataParallel`. Training asks it to
`shard` the model, to `reduce` what each process has computed, and to `gather` what a checkpoint holds.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from qlora.errors import RecipeError
from qlora.recipe import Recipe
from qlora.runtime.allocators import grow_by_pages

Found = TypeVar("Found")
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class DataParallel:
    """Every process holds the whole model and works on its share of each step's micro-batches.

    device: of this process. rank: its number, 0 for the main one. count: how many there are; 1 is an ordinary run.
    """

    device: torch.device
    rank: int = 0
    count: int = 1

    @classmethod
    def of(cls, recipe: Recipe) -> "DataParallel":
        """This process among those that `torchrun` or `accelerate launch` started.

        Raises RecipeError if the recipe wants a GPU and there is none.
        """
        grow_by_pages()
        accelerator = Accelerator(cpu=recipe.training.device == "cpu" or not torch.cuda.is_available())
        if recipe.training.device == "cuda" and accelerator.device.type != "cuda":
            raise RecipeError(
                "training.device: cuda was asked for, but torch finds no CUDA device; set training.device=auto"
            )
        return cls(accelerator.device, accelerator.process_index, accelerator.num_processes)

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and speaks to the user."""
        return self.rank == 0

    def shard(self, model: Model) -> Model:
        """This process's part of `model`: all of it."""
        return model

    def reduce(self, tensors: Iterable[Tensor]) -> None:
        """Add up each tensor over the processes, in place. Each holds a share of the step's sum, not a mean."""
        if self.count > 1:
            for tensor in tensors:
                torch.distributed.all_reduce(tensor)

    def gather(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The whole of what each process has a part of, on the main process: here it has all of it."""
        return state

    def from_main(self, find: Callable[[], Found]) -> Found:
        """Run `find` on the main process; give every process its result, or its error."""
        if self.count == 1:
            return find()
        news: list[Any] = [None]
        if self.is_main:
            try:
                news = [find()]
            except ValueError as error:
                news = [error]
        broadcast_object_list(news)
        if isinstance(news[0], Exception):
            raise news[0]
        found: Found = news[0]
        return found
