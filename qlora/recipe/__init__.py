"""The recipe: all settings of a training run, checked before anything else happens. Does not import torch."""

from qlora.recipe.adapter import Adapter
from qlora.recipe.schema import (
    Base,
    Checkpointing,
    Data,
    Optimizer,
    Recipe,
    Training,
)
from qlora.recipe.tracking import Tracking, Wandb

__all__ = ["Adapter", "Base", "Checkpointing", "Data", "Optimizer", "Recipe", "Tracking", "Training", "Wandb"]
