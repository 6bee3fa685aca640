"""Training: a run from its recipe to its result, with checkpoints and exact resume."""
