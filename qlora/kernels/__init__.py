"""Memory-bound operations between the matrix products, and the products of experts, in plain torch and in Triton.

An operation writes into tensors that it gets as arguments. A GPU uses the kernel after a check that it agrees there
with the plain form (`dispatch`). Other devices use the plain form, as does a GPU with QLORA_KERNELS=off.
"""

from qlora.kernels.cross_entropy import loss_and_gradient
from qlora.kernels.dispatch import FusedOp, compiled_for
from qlora.kernels.gate import GELU_TANH, SILU, Activation
from qlora.kernels.norm import normalize, normalize_gradient
from qlora.kernels.rotary import rotate

__all__ = [
    "GELU_TANH",
    "SILU",
    "Activation",
    "FusedOp",
    "compiled_for",
    "loss_and_gradient",
    "normalize",
    "normalize_gradient",
    "rotate",
]
