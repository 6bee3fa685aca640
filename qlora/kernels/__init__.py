"""The passes over memory between the products, each in plain torch and as one launch of a Triton kernel.

A pass writes into tensors that it is given. A GPU takes the kernel, once it is seen to agree there with the plain
form (`dispatch`); every other device, and whoever sets QLORA_KERNELS=off, takes the plain form.
"""

from qlora.kernels.cross_entropy import loss_and_gradient
from qlora.kernels.dispatch import FusedOp
from qlora.kernels.gate import GELU_TANH, SILU, Activation
from qlora.kernels.norm import normalize, normalize_gradient
from qlora.kernels.rotary import rotate

__all__ = [
    "GELU_TANH",
    "SILU",
    "Activation",
    "FusedOp",
    "loss_and_gradient",
    "normalize",
    "normalize_gradient",
    "rotate",
]
