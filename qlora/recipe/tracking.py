"""The section `tracking` of a recipe."""

from typing import Literal

from qlora.recipe.section import Section, Text


class Wandb(Section):
    """Weights & Biases: a copy of metrics.jsonl in the browser."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online if a W&B API key is configured, else offline."""
    project: Text = "qlora"
    """W&B project of the run."""
    entity: Text | None = None
    """W&B user or team; null: the account's default."""
    name: Text | None = None
    """Name of the run; null: the name of its folder."""
    tags: list[Text] = []
    """Labels of the run, for searches."""


class Tracking(Section):
    """Experiment trackers, in addition to the metrics in the run's folder."""

    wandb: Wandb = Wandb()
    """Weights & Biases."""
    tensorboard: bool = False
    """Write TensorBoard event files to the run's folder; needs `pip install tensorboard`."""
