"""The gated block against autograd in fp64: with each norm or none, each activation, and any set of saved tensors."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from qlora.kernels import GELU_TANH, SILU
from qlora.ops import dropout as dropout_module
from qlora.ops import mlp as mlp_module
from qlora.ops.dropout import Dropout
from qlora.ops.mlp import Forward, GatedMLP, gated_mlp
from qlora.ops.products import Linear, Update
from qlora.ops.rms_norm import Norm

HIDDEN, INTERMEDIATE, RANK = 12, 20, 3
SHAPES = [(INTERMEDIATE, HIDDEN), (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)]  # gate, up, down
REFERENCES = {SILU: F.silu, GELU_TANH: partial(F.gelu, approximate="tanh")}


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def block_of(norms: str, rate: float = 0.0, activation: Any = SILU) -> GatedMLP:
    linears = [
        Linear(numbers(*shape) / 4, None, numbers(shape[0]), 0.5, Dropout(rate, seed) if rate else None)
        for seed, shape in enumerate(SHAPES)
    ]
    before = Norm(1 + numbers(HIDDEN) / 4, 1e-5) if "before" in norms else None
    after = Norm(numbers(HIDDEN) / 4, 1e-3, offset=1.0, rounds_late=True) if "after" in norms else None
    return GatedMLP(linears, before, after, activation)


def reference(hidden: Tensor, block: GatedMLP, updates: list[Update]) -> Tensor:
    """Compute the block by its definition."""

    def linear(number: int, x: Tensor) -> Tensor:
        weight, _, bias, scaling, drop, _ = block.linears[number]
        dropped = x if drop is None else x * drop.mask(x) / (1 - drop.rate)
        return F.linear(x, weight, bias) + scaling * F.linear(
            F.linear(dropped, updates[number].a), updates[number].b
        )

    def normal(x: Tensor, norm: Norm | None) -> Tensor:
        return x if norm is None else F.rms_norm(x, (HIDDEN,), norm.weight + norm.offset, norm.eps)

    x = normal(hidden, block.norm)
    product = REFERENCES[block.activation](linear(0, x)) * linear(1, x)
    return hidden + normal(linear(2, product), block.post_norm)


def case(norms: str, **settings: Any) -> tuple[Tensor, GatedMLP, list[Update]]:
    """Return an input [2, 5, H], a block, and its A and B."""
    torch.manual_seed(0)
    updates = [
        Update(numbers(RANK, fan_in).requires_grad_(), numbers(fan_out, RANK).requires_grad_())
        for fan_out, fan_in in SHAPES
    ]
    return numbers(2, 5, HIDDEN).requires_grad_(), block_of(norms, **settings), updates


def gradients(y: Tensor, hidden: Tensor, updates: list[Update]) -> tuple[Tensor, ...]:
    tensors = [hidden, *(tensor for update in updates for tensor in update)]
    return torch.autograd.grad((y * torch.linspace(-1, 2, y.numel()).view(y.shape)).sum(), tensors)


NORMS = ["none", "before", "after", "before and after"]


@pytest.mark.parametrize("mode", [Forward.SAVE, Forward.RECOMPUTE_WIDE])
@pytest.mark.parametrize("activation", REFERENCES, ids=["silu", "gelu_tanh"])
@pytest.mark.parametrize("rate", [0.0, 0.4])
@pytest.mark.parametrize("norms", NORMS)
def test_outputs_and_gradients_match_the_definition(
    norms: str, rate: float, activation: Any, mode: Forward
) -> None:
    hidden, block, updates = case(norms, rate=rate, activation=activation)
    expected, y = reference(hidden, block, updates), gated_mlp(hidden, block, updates, mode)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradients(y, hidden, updates), gradients(expected, hidden, updates))
    with torch.no_grad():
        torch.testing.assert_close(gated_mlp(hidden, block, updates, mode), expected)


@pytest.mark.parametrize("rate", [0.0, 0.4])
@pytest.mark.parametrize("norms", NORMS)
def test_pieces_and_recomputes_have_the_same_gradients(
    norms: str, rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (dropout_module, mlp_module):
        monkeypatch.setattr(module, "PIECE", 4)  # of ten tokens
    hidden, block, updates = case(norms, rate=rate)
    kept, *others = (
        gated_mlp(hidden, block, updates, mode)
        for mode in (Forward.SAVE, Forward.RECOMPUTE_WIDE, Forward.RECOMPUTE)
    )
    torch.testing.assert_close(others[0], kept)
    expected = gradients(kept, hidden, updates)
    for y in others:
        torch.testing.assert_close(gradients(y, hidden, updates), expected)


def test_the_last_product_is_recomputed_only_for_a_norm_after_it() -> None:
    def again(norms: str) -> int:
        """Return the extra operations of a backward that recomputes gate and up."""
        operations = []
        for mode in (Forward.RECOMPUTE_WIDE, Forward.SAVE):
            hidden, block, updates = case(norms)
            y = gated_mlp(hidden, block, updates, mode)
            with FlopCounterMode(display=False) as counted:
                gradients(y, hidden, updates)
            operations.append(counted.get_total_flops())
        return operations[0] - operations[1]

    ranks = 2 * 10 * RANK * (2 * HIDDEN + INTERMEDIATE)
    product = 2 * 10 * HIDDEN * INTERMEDIATE + 2 * RANK * HIDDEN * INTERMEDIATE  # and B A, added to W
    assert again("before") == 2 * product + ranks
    assert again("before and after") == 3 * product + ranks


@pytest.mark.parametrize("mode", [Forward.SAVE, Forward.RECOMPUTE_WIDE])
@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_gate_and_up_can_be_one_linear_and_the_output_can_have_a_factor(rate: float, mode: Forward) -> None:
    """The linear has one A for both, and so one mask."""
    hidden, block, updates = case("before and after", rate=rate)
    gate, up, down = block.linears
    assert gate.bias is not None
    assert up.bias is not None
    stacked = gate._replace(
        weight=torch.cat([gate.weight, up.weight]),
        bias=torch.cat([gate.bias, up.bias]),
        sizes=(INTERMEDIATE, INTERMEDIATE),
    )
    a, b = updates[0].a, numbers(2 * INTERMEDIATE, RANK).requires_grad_()
    ours = [Update(a, b), updates[2]]
    parts = [Update(a, b[:INTERMEDIATE]), Update(a, b[INTERMEDIATE:]), updates[2]]
    apart = block._replace(linears=[gate, up._replace(dropout=gate.dropout), down])
    expected = hidden + 0.3 * (reference(hidden, apart, parts) - hidden)
    y = gated_mlp(hidden, block._replace(linears=[stacked, down], scale=0.3), ours, mode)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradients(y, hidden, ours), gradients(expected, hidden, ours))
