"""What is learned from a batch, one file an objective, and the one training step that learns it."""

from qlora.objective.causal_lm import CausalLM
from qlora.objective.objective import Objective
from qlora.recipe import Recipe

__all__ = ["CausalLM", "Objective", "objective_of"]


def objective_of(recipe: Recipe) -> Objective:
    """The recipe's objective."""
    return CausalLM(loss_chunk=recipe.training.loss_chunk)
