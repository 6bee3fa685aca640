"""Autograd functions of our own: the adapted linear, and the output head with its loss."""

from qlora.ops.cross_entropy import IGNORE_INDEX, linear_cross_entropy
from qlora.ops.lora_linear import lora_linear

__all__ = ["IGNORE_INDEX", "linear_cross_entropy", "lora_linear"]
