"""silu(gate) * up, and its gradients."""

from typing import Any

import torch
from torch import Tensor

from qlora.kernels.dispatch import FusedOp, numbers


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, all [N, I] and contiguous."""
    assert gate.is_contiguous()
    assert up.is_contiguous()
    product = torch.empty_like(gate)
    SILU_PRODUCT(gate, up, product)
    return product


def silu_gradients(gate: Tensor, up: Tensor, grad: Tensor, d_up: Tensor) -> None:
    """From `grad`, that of the product, the gradient of gate, in the place of `grad`, and that of up, in `d_up`."""
    assert all(tensor.is_contiguous() for tensor in (gate, up, grad, d_up))
    SILU_GRADIENTS(gate, up, grad, d_up)


def _silu_product(gate: Tensor, up: Tensor, product: Tensor) -> None:
    torch.ops.aten.silu.out(gate, out=product).mul_(up)


def _silu_gradients(gate: Tensor, up: Tensor, grad: Tensor, d_up: Tensor) -> None:
    torch.ops.aten.silu.out(gate, out=d_up).mul_(grad)
    torch.ops.aten.silu_backward.grad_input(grad.mul_(up), gate, grad_input=grad)


def _example(device: torch.device, dtype: torch.dtype, tensors: int) -> tuple[Any, ...]:
    return tuple(numbers(device, dtype, 37, 520, seed=seed) for seed in range(tensors))


SILU_PRODUCT = FusedOp(_silu_product, "silu_product", lambda device, dtype: _example(device, dtype, 3))
SILU_GRADIENTS = FusedOp(_silu_gradients, "silu_gradients", lambda device, dtype: _example(device, dtype, 4))
