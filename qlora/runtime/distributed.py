"""The process among those of a run: its device, and what all of them must agree on."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from qlora.errors import RecipeError
from qlora.recipe import Recipe
from qlora.runtime.allocators import grow_by_pages

Found = TypeVar("Found")


def accelerator_for(recipe: Recipe) -> Accelerator:
    """This process and its device. Raises RecipeError if the recipe wants a GPU and there is none."""
    grow_by_pages()
    accelerator = Accelerator(cpu=recipe.training.device == "cpu" or not torch.cuda.is_available())
    if recipe.training.device == "cuda" and accelerator.device.type != "cuda":
        raise RecipeError(
            "training.device: cuda was asked for, but torch finds no CUDA device; set training.device=auto"
        )
    return accelerator


def broadcast_from_main(accelerator: Accelerator, find: Callable[[], Found]) -> Found:
    """What the main process finds, in every process; its error too."""
    if accelerator.num_processes == 1:
        return find()
    news: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            news = [find()]
        except ValueError as error:
            news = [error]
    broadcast_object_list(news)
    if isinstance(news[0], Exception):
        raise news[0]
    return news[0]
