"""Layer normalisation (Ba et al. 2016) with a frozen weight and no bias: (x - mean(x)) / sqrt(var(x) + eps) * weight.

Torch's own kernels compute it and its gradient.
"""

import torch
from torch import Tensor

aten = torch.ops.aten


def layer_normalize(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise x [..., H] with the weight [H]; the result has x.dtype and is rounded once."""
    return torch.layer_norm(x.contiguous(), weight.shape, weight.to(x.dtype), None, eps)


def layer_normalize_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> None:
    """Overwrite `grad`, dL/dy [..., H], with dL/dx + residual (no residual if None)."""
    x, weight = x.contiguous(), weight.to(x.dtype)
    _, mean, scale = aten.native_layer_norm(x, weight.shape, weight, None, eps)
    own = [True, False, False]  # the gradient of x alone
    dx, _, _ = aten.native_layer_norm_backward(grad, x, weight.shape, mean, scale, weight, None, own)
    grad.copy_(dx if residual is None else dx.add_(residual))
