"""The product act(gate) * up of a gated MLP, and its gradients, for each activation."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qlora.kernels.dispatch import FusedOp, numbers
from qlora.runtime.device import on_cuda


class Activation(NamedTuple):
    """The two operations of a gated MLP that depend on its activation."""

    product: Callable[[Tensor, Tensor, Tensor], None]
    """called with (gate, up, product): writes act(gate) * up to `product`; all [N, I], on CUDA contiguous"""
    gradients: Callable[[Tensor, Tensor, Tensor, Tensor], None]
    """called with (gate, up, grad, d_up): reads the product's gradient from `grad`, overwrites `grad` with the
    gradient of gate, and writes the gradient of up to `d_up`"""


def silu_product(gate: Tensor, up: Tensor, product: Tensor) -> None:
    """Write silu(gate) * up to `product`; all [N, I], on CUDA contiguous."""
    assert _readable(gate, up, product)
    SILU_PRODUCT(gate, up, product)


def silu_gradients(gate: Tensor, up: Tensor, grad: Tensor, d_up: Tensor) -> None:
    """Overwrite `grad`, the product's gradient, with that of gate, and `d_up` with that of up.

    All are [N, I], on CUDA contiguous.
    """
    assert _readable(gate, up, grad, d_up)
    SILU_GRADIENTS(gate, up, grad, d_up)


def gelu_tanh_product(gate: Tensor, up: Tensor, product: Tensor) -> None:
    """Like `silu_product`, for GELU's tanh approximation. Plain torch on every device; there is no kernel yet."""
    torch.ops.aten.gelu.out(gate, approximate="tanh", out=product).mul_(up)


def gelu_tanh_gradients(gate: Tensor, up: Tensor, grad: Tensor, d_up: Tensor) -> None:
    """Like `silu_gradients`, for GELU's tanh approximation. Plain torch on every device."""
    torch.ops.aten.gelu.out(gate, approximate="tanh", out=d_up).mul_(grad)
    torch.ops.aten.gelu_backward.grad_input(grad.mul_(up), gate, approximate="tanh", grad_input=grad)


def _readable(*tensors: Tensor) -> bool:
    """Return True if the kernel can read and write these tensors: it takes them for contiguous."""
    return all(tensor.is_contiguous() or not on_cuda(tensor) for tensor in tensors)


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
