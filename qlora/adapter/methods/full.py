"""Full fine-tuning: every weight of an unquantized base is trained, and the result is a whole model."""

from torch import nn

from qlora.adapter.methods.method import Method
from qlora.recipe import Adapter


class Full(Method):
    """Full fine-tuning: trains every weight."""

    name = "full"

    def apply(self, model: nn.Module, settings: Adapter, seed: int) -> nn.Module:
        """Make every parameter trainable."""
        return model.requires_grad_(True)
