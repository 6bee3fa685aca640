"""Training objectives, one file each, and the training step that they share."""

from qlora.objective.causal_lm import CausalLM
from qlora.objective.objective import Objective
from qlora.recipe import Recipe

__all__ = ["CausalLM", "Objective", "objective_of"]


def objective_of(recipe: Recipe) -> Objective:
    """Return the object that computes the loss which the recipe trains; causal language modelling today."""
    return CausalLM(loss_chunk=recipe.training.loss_chunk)
