"""The recipe: what a training run is told, checked before anything else happens. Knows no torch."""

from qlora.recipe.schema import Adapter, Base, Data, Optimizer, Recipe, Tracking, Training, Wandb

__all__ = ["Adapter", "Base", "Data", "Optimizer", "Recipe", "Tracking", "Training", "Wandb"]
