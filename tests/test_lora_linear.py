"""The adapted linear against fp64: forward, every gradient, dropout, checkpointing, and its saved tensors."""

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from qlora import ops
from qlora.ops.dropout import Dropout, draw
from qlora.ops.products import Linear, Update
from qlora.quantization import nf4

ROUNDING = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2e-2}


class Counted(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))

    @property
    def dequantizations(self) -> int:
        return self.calls["bitsandbytes.dequantize_4bit.default"]


def case(
    out_features: int, in_features: int, rank: int, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Return arguments of lora_linear for an NF4 weight; A and B are trainable and have `dtype`."""
    weight = nf4.quantize(torch.randn(out_features, in_features))
    return {
        "weight": weight,
        "quant_state": weight.quant_state,
        "bias": torch.randn(out_features, dtype=dtype),
        "lora_a": torch.randn(rank, in_features, dtype=dtype).requires_grad_(),
        "lora_b": torch.randn(out_features, rank, dtype=dtype).requires_grad_(),
    }


def lora_linear(
    x: Tensor,
    weight: Tensor,
    quant_state: Any,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float = 1.0,
    dropout: float = 0.0,
    training: bool = True,
) -> Tensor:
    """Call the operation with a dropout mask drawn for this call."""
    mask = draw(dropout if training else 0.0)
    return ops.lora_linear(x, Linear(weight, quant_state, bias, scaling, mask), Update(lora_a, lora_b))


def dense(arguments: dict[str, Any]) -> Tensor:
    """Return the weight [out, in] in fp64."""
    weight, state = arguments["weight"], arguments["quant_state"]
    return nf4.dequantize(weight, state, torch.float64) if state else weight.double()


def reference(x: Tensor, arguments: dict[str, Any], scaling: float, mask: Tensor | float = 1.0) -> Tensor:
    """Compute the definition in fp64 with the dequantized weight."""
    w = dense(arguments)
    a, b = arguments["lora_a"], arguments["lora_b"]
    bias = 0 if arguments["bias"] is None else arguments["bias"].double()
    return x @ w.T + bias + scaling * (x * mask) @ a.T @ b.T


def double(tensor: Tensor) -> Tensor:
    return tensor.detach().double().requires_grad_(tensor.requires_grad)


def error(found: Tensor, expected: Tensor) -> float:
    return (found.double() - expected).norm().item()


def norm(tensor: Tensor) -> float:
    return tensor.double().norm().item()


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.sampled_from([(1,), (7,), (2, 5), (2, 1, 3), ()]),
    out_features=st.integers(1, 90),
    in_features=st.one_of(st.integers(1, 90), st.sampled_from([96, 112, 160])),
    rank=st.integers(1, 9),
    scaling=st.sampled_from([0.25, 1.0, 2.0]),
    quantized=st.booleans(),
    has_bias=st.booleans(),
    dtypes=st.sampled_from(
        [
            (torch.float64, torch.float64),
            (torch.float32, torch.float32),
            (torch.float32, torch.bfloat16),
            (torch.bfloat16, torch.bfloat16),
        ]
    ),
)
def test_forward_and_all_gradients_agree_with_fp64(
    tokens: tuple[int, ...],
    out_features: int,
    in_features: int,
    rank: int,
    scaling: float,
    quantized: bool,
    has_bias: bool,
    dtypes: tuple[torch.dtype, torch.dtype],
) -> None:
    compute, stored = dtypes
    arguments = case(out_features, in_features, rank, stored)
    if not quantized:
        arguments |= {"weight": torch.randn(out_features, in_features, dtype=stored), "quant_state": None}
    if not has_bias:
        arguments["bias"] = None
    x = torch.randn(*tokens, in_features, dtype=compute).requires_grad_()
    upstream = torch.randn(*tokens, out_features, dtype=compute)
    y = lora_linear(x, **arguments, scaling=scaling)
    y.backward(upstream)

    exact = {**arguments, "lora_a": double(arguments["lora_a"]), "lora_b": double(arguments["lora_b"])}
    x64 = double(x)
    y64 = reference(x64, exact, scaling)
    y64.backward(upstream.double())
    assert (y.dtype, y.shape) == (compute, y64.shape)
    # Errors are relative to the norms of the factors: a result that cancels out keeps their rounding errors
    w, a, b = norm(dense(arguments)), norm(arguments["lora_a"]), norm(arguments["lora_b"])
    bias = norm(arguments["bias"]) if has_bias else 0
    assert error(y, y64) <= ROUNDING[compute] * (norm(x) * (w + scaling * a * b) + bias)
    assert error(x.grad, x64.grad) <= ROUNDING[compute] * norm(upstream) * (w + scaling * a * b)
    for name, other in (("lora_a", b), ("lora_b", a)):
        assert arguments[name].grad.dtype == stored
        bound = ROUNDING[stored] * scaling * norm(upstream) * norm(x) * other
        assert error(arguments[name].grad, exact[name].grad) <= bound, name


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_agree_with_finite_differences(dropout: float) -> None:
    arguments = case(6, 13, 3, torch.float64)  # 13 columns: a block of 64 ends inside a row
    x = torch.randn(2, 2, 13, dtype=torch.float64, requires_grad=True)

    def product(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        torch.manual_seed(1)  # the same mask at every call
        return lora_linear(x, **{**arguments, "lora_a": a, "lora_b": b}, scaling=0.7, dropout=dropout)

    assert torch.autograd.gradcheck(product, (x, arguments["lora_a"], arguments["lora_b"]))


def test_dropout_masks_only_the_input_of_a_and_only_in_training() -> None:
    arguments = case(9, 80, 4, torch.float64)
    x = torch.randn(50, 80, dtype=torch.float64)
    whole = {**arguments, "lora_a": torch.eye(80), "lora_b": torch.eye(80)}  # the output is the mask
    whole["weight"], whole["quant_state"], whole["bias"] = torch.zeros(80, 80), None, None
    torch.manual_seed(5)
    mask = lora_linear(torch.ones(50, 80), **whole, dropout=0.25) > 0
    assert mask.double().mean().item() == pytest.approx(0.75, abs=0.03)
    torch.manual_seed(5)
    y = lora_linear(x, **arguments, scaling=0.5, dropout=0.25)
    torch.testing.assert_close(y, reference(x, arguments, 0.5, mask.double() / 0.75))
    again = lora_linear(x, **arguments, scaling=0.5, dropout=0.25)
    assert not torch.equal(again, y), "each pass must draw a new mask"
    calm = lora_linear(x, **arguments, scaling=0.5, dropout=0.25, training=False)
    assert torch.equal(calm, lora_linear(x, **arguments, scaling=0.5))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_checkpointing_gives_the_same_gradients_bit_for_bit(dropout: float) -> None:
    arguments = [case(64, 64, 4) for _ in range(3)]
    x = torch.randn(5, 64, requires_grad=True)

    def layer(x: Tensor, index: int) -> Tensor:
        return torch.tanh(lora_linear(x, **arguments[index], scaling=0.5, dropout=dropout))

    def gradients(checkpointed: bool) -> list[Tensor]:
        torch.manual_seed(11)
        y = x
        for index in range(3):
            y = checkpoint(layer, y, index, use_reentrant=False) if checkpointed else layer(y, index)
        inputs = [x, *(case["lora_a"] for case in arguments), *(case["lora_b"] for case in arguments)]
        return list(torch.autograd.grad(y.square().sum(), inputs))

    pairs = list(zip(gradients(True), gradients(False), strict=True))
    assert all(torch.equal(found, expected) for found, expected in pairs)
    assert all(expected.any() for _, expected in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 130, 361])
def test_padding_rows_do_not_change_the_mask_of_other_rows(rows: int, dtype: torch.dtype) -> None:
    """Documents train the same with dropout, whether or not a device pads its passes."""
    dropout, filled = Dropout(0.3, seed=5), torch.empty(-(-rows // 128) * 128, 48, dtype=dtype)
    mask = dropout.mask(filled[:rows].clone())
    assert not mask.all()
    assert torch.equal(mask, dropout.mask(filled)[:rows])


def test_the_weight_is_dequantized_once_a_pass_and_only_where_needed() -> None:
    arguments = case(64, 64, 4)
    for needs_x, backward in ((True, 1), (False, 0)):
        x = torch.randn(5, 64, requires_grad=needs_x)
        with Counted() as forward_calls:
            y = lora_linear(x, **arguments)
        with Counted() as backward_calls:
            y.sum().backward()
        assert forward_calls.dequantizations == 1
        assert backward_calls.dequantizations == backward, "without x's gradient the weight is not needed"
        assert arguments["lora_a"].grad is not None
        assert (x.grad is not None) == needs_x


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_only_the_input_and_the_low_rank_are_saved(dropout: float) -> None:
    tokens, width, rank = 12, 256, 4
    arguments = case(512, width, rank)
    x = torch.randn(tokens, width, requires_grad=True)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        lora_linear(x, **arguments, dropout=dropout)
    adapters = {arguments["lora_a"].data_ptr(), arguments["lora_b"].data_ptr()}
    activations = sum(tensor.nbytes for tensor in saved if tensor.data_ptr() not in adapters)
    assert activations == tokens * (4 * width + 4 * rank), "dropout's mask must not be saved"


def test_an_input_can_have_any_layout() -> None:
    arguments = case(10, 32, 2)
    base = torch.randn(32, 6, 4)
    for x in (base.permute(2, 1, 0), base.permute(1, 2, 0)[::2], torch.randn(1, 32).expand(5, 32)):
        x = x.detach().requires_grad_()
        y = lora_linear(x, **arguments)
        (found,) = torch.autograd.grad(y.sum(), x)
        flat = x.detach().contiguous().requires_grad_()
        assert torch.equal(y, lora_linear(flat, **arguments))
        assert torch.equal(found, torch.autograd.grad(lora_linear(flat, **arguments).sum(), flat)[0])
    assert lora_linear(torch.randn(0, 32), **arguments).shape == (0, 10)
    assert lora_linear(torch.randn(2, 0, 32), **arguments).shape == (2, 0, 10)


def test_only_the_needed_gradients_are_computed() -> None:
    arguments = case(8, 16, 2)
    x = torch.randn(3, 16)
    with torch.no_grad():
        assert not lora_linear(x, **arguments).requires_grad
    frozen = {**arguments, "lora_a": arguments["lora_a"].detach(), "lora_b": arguments["lora_b"].detach()}
    assert not lora_linear(x, **frozen).requires_grad
    half = {**frozen, "lora_b": arguments["lora_b"]}
    lora_linear(x, **half).sum().backward()
    assert arguments["lora_b"].grad is not None
    trainable = {**arguments, "weight": torch.randn(8, 16, requires_grad=True), "quant_state": None}
    with pytest.raises(AssertionError, match="must be frozen"):
        lora_linear(x, **trainable)


@pytest.mark.parametrize("adapted", [True, False])
def test_autocast_computes_in_its_dtype(adapted: bool) -> None:
    arguments = case(8, 64, 2) | ({} if adapted else {"lora_a": None, "lora_b": None})
    x = torch.randn(3, 64, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = lora_linear(x, **arguments)
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, lora_linear(x.bfloat16(), **arguments))
    assert x.grad.dtype == torch.float32
    assert not adapted or arguments["lora_a"].grad.dtype == torch.float32


def test_without_an_adapter_it_is_the_frozen_linear() -> None:
    arguments = {**case(8, 16, 2), "lora_a": None, "lora_b": None}
    x = torch.randn(3, 16, requires_grad=True)
    y = lora_linear(x, **arguments)
    assert torch.equal(
        y, nf4.frozen_linear(x, arguments["weight"], arguments["quant_state"], arguments["bias"])
    )
    y.sum().backward()
    w = nf4.dequantize(arguments["weight"], arguments["quant_state"], torch.float32)
    torch.testing.assert_close(x.grad, w.sum(0).expand(3, 16))


def test_it_runs_on_fake_tensors() -> None:
    with FakeTensorMode():
        weight = nf4.synthetic_weight(96, 160)
        a = torch.empty(8, 160, dtype=torch.bfloat16, requires_grad=True)
        b = torch.empty(96, 8, dtype=torch.bfloat16, requires_grad=True)
        x = torch.empty(2, 3, 160, requires_grad=True)
        y = lora_linear(x, weight, weight.quant_state, None, a, b, 1.0, 0.1)
        y.sum().backward()
        assert (y.shape, x.grad.shape, a.grad.shape, b.grad.dtype) == (
            (2, 3, 96),
            x.shape,
            a.shape,
            torch.bfloat16,
        )
