"""A gate, act(gate) * up, and its gradients, for each activation that a gated MLP has."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora.kernels.dispatch import FusedOp, numbers


class Activation(NamedTuple):
    """An activation, as the two passes that a gated MLP makes with it."""

    product: Callable[[Tensor, Tensor], Tensor]
    """act(gate) * up, all [N, I] and contiguous"""
    gradients: Callable[[Tensor, Tensor, Tensor, Tensor], None]
    """(gate, up, grad, d_up): from `grad`, that of the product, the gradient of gate, in the place of `grad`, and that
    of up, in `d_up`"""


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


def gelu_tanh_product(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up with GELU's tanh approximation. Plain torch on every device: there is no kernel yet."""
    return torch.ops.aten.gelu(gate, approximate="tanh").mul_(up)


def gelu_tanh_gradients(gate: Tensor, up: Tensor, grad: Tensor, d_up: Tensor) -> None:
    """As `silu_gradients`; plain torch on every device."""
    torch.ops.aten.gelu.out(gate, approximate="tanh", out=d_up).mul_(grad)
    torch.ops.aten.gelu_backward.grad_input(grad.mul_(up), gate, approximate="tanh", grad_input=grad)


def _silu_product(gate: Tensor, up: Tensor, product: Tensor) -> None:
    torch.ops.aten.silu.out(gate, out=product).mul_(up)


def _silu_gradients(gate: Tensor, up: Tensor, grad: Tensor, d_up: Tensor) -> None:
    torch.ops.aten.silu.out(gate, out=d_up).mul_(grad)
    torch.ops.aten.silu_backward.grad_input(grad.mul_(up), gate, grad_input=grad)


def _example(device: torch.device, dtype: torch.dtype, tensors: int) -> tuple[Any, ...]:
    return tuple(numbers(device, dtype, 37, 520, seed=seed) for seed in range(tensors))


SILU_PRODUCT = FusedOp(_silu_product, "silu_product", lambda device, dtype: _example(device, dtype, 3))
SILU_GRADIENTS = FusedOp(_silu_gradients, "silu_gradients", lambda device, dtype: _example(device, dtype, 4))

SILU = Activation(silu_product, silu_gradients)
GELU_TANH = Activation(gelu_tanh_product, gelu_tanh_gradients)
