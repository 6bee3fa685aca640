"""The recipe: what a training run is told, checked before anything else happens. Knows no torch."""

from qlora.recipe.schema import (
    Adapter,
    Base,
    Checkpointing,
    Data,
    Optimizer,
    Recipe,
    Tracking,
    Training,
    Wandb,
)

__all__ = ["Adapter", "Base", "Checkpointing", "Data", "Optimizer", "Recipe", "Tracking", "Training", "Wandb"]
