"""Custom autograd functions, such as the adapted linear and the output head with its loss."""

from qlora.ops.cross_entropy import linear_cross_entropy
from qlora.ops.lora_linear import lora_linear

__all__ = ["linear_cross_entropy", "lora_linear"]
