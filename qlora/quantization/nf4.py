"""NF4: 4-bit weights and the product with them. No other module uses bitsandbytes' 4-bit code directly.

A weight [out, in] is stored flat, in blocks of `block_size` consecutive values: two 4-bit codes per byte, and one
fp32 absmax per block. Double quantization stores the absmax in 8 bits, in blocks of 256. A weight value then takes
0.5 + 1/64 + 4/(64 * 256) = 0.515869 bytes (QLoRA, Dettmers et al. 2023, sections 3.1-3.2).

This module avoids two problems of bitsandbytes 0.50. In eval mode on CPUs with AVX512-BF16, `Linear4bit.forward`
repacks the weight in place and gives no gradients from then on, so nothing here calls it. The AVX512 dequantization
kernel returns garbage if the row length is not a multiple of the block, so on a CPU each block is passed as a row.
"""

from collections.abc import Mapping
from typing import Any, Self, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from qlora.errors import ModelError, UsageError
from qlora.kernels import FusedOp
from qlora.quantization.stored_form import why_not_whole
from qlora.runtime.bnb import Linear4bit, Params4bit, QuantState, create_dynamic_map, get_4bit_type
from qlora.runtime.device import on_cuda
from qlora.runtime.fake import is_fake
from qlora.runtime.phases import Allocation, announce

__all__ = [
    "Linear4bit",
    "NF4Linear",
    "Params4bit",
    "QuantState",
    "assert_frozen",
    "autocast",
    "dense",
    "dequantize",
    "from_tensors",
    "frozen_linear",
    "is_nf4",
    "quant_state",
    "quantize",
    "rounded",
    "statistics",
    "synthetic_weight",
    "to_tensors",
    "use_nf4_linears",
    "weight_bytes",
]

BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
STATISTICS_BLOCK_SIZE = 256
"""Block size of the second quantization (of the absmax), fixed by bitsandbytes."""

SLICE = 2**22
"""Number of values quantized at a time, a multiple of every block size."""

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Output dtypes of bitsandbytes' dequantization kernels."""

# Tables are plain numbers, because a tensor made under FakeTensorMode would remain fake
NF4_CODE: list[float] = get_4bit_type("nf4", device="cpu").tolist()
DYNAMIC_CODE: list[float] = create_dynamic_map().tolist()
NF4_CODE_RMS = (sum(value * value for value in NF4_CODE) / len(NF4_CODE)) ** 0.5


def quantize(weight: Tensor, block_size: int = 64, double_quant: bool = True) -> Params4bit:
    """Quantize `weight` [out, in] to NF4 on its own device; the same bytes as `bitsandbytes.quantize_4bit`.

    Raises:
        ModelError: The weight is not a matrix of floats.
        UsageError: `block_size` is not one of BLOCK_SIZES.
    """
    _check_block_size(block_size)
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ModelError(f"NF4 needs a matrix of floats, not {weight.dtype} of shape {tuple(weight.shape)}")
    dtype = weight.dtype if weight.dtype in KERNEL_DTYPES else torch.float32
    weight = weight.detach().to(dtype).contiguous()
    # In slices of whole blocks: on a CPU the kernel's temporaries take four times the memory of its input
    slices = [
        torch.ops.bitsandbytes.quantize_4bit(part, block_size, "nf4", torch.uint8)
        for part in weight.view(-1).split(SLICE)
    ]
    packed, absmax = (torch.cat(parts) for parts in zip(*slices, strict=True))
    return _parameter(packed, _state(absmax, weight.shape, dtype, block_size, double_quant))


def rounded(weight: Tensor, block_size: int = 64, double_quant: bool = True) -> Tensor:
    """Return the values of `weight` [out, in] after quantization to NF4, in fp32."""
    packed = quantize(weight, block_size, double_quant)
    return dequantize(packed, packed.quant_state, torch.float32)


def synthetic_weight(
    out_features: int,
    in_features: int,
    *,
    block_size: int = 64,
    double_quant: bool = True,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
    std: float = 0.02,
) -> Params4bit:
    """Make a random NF4 weight of standard deviation `std`, without an intermediate full-precision weight.

    Codes are uniform, because NF4 is designed so that a normal weight uses them about equally. The absmax vary by a
    fifth around the value that gives `std`. `generator` must be on `device`. Works under FakeTensorMode.
    """
    _check_block_size(block_size)
    count = out_features * in_features
    packed = torch.empty((count + 1) // 2, 1, dtype=torch.uint8, device=device)
    packed.random_(0, 256, generator=generator)
    # U(0.8, 1.2) divided by its root mean square; with rand, because uniform_ fails on fake CUDA tensors
    absmax = torch.rand(-(count // -block_size), device=device, generator=generator).mul_(0.4).add_(0.8)
    absmax.mul_(std / NF4_CODE_RMS / (1 + 0.4**2 / 12) ** 0.5)
    shape = torch.Size((out_features, in_features))
    return _parameter(packed, _state(absmax, shape, torch.bfloat16, block_size, double_quant))


def dequantize(weight: Tensor, state: QuantState, dtype: torch.dtype) -> Tensor:
    """Dequantize the packed bytes `weight` to a matrix [out, in] in `dtype`, exactly for every width.

    Works under FakeTensorMode. A dtype that bitsandbytes cannot write (float64) is cast from float32, which
    holds every dequantized value exactly as the kernels compute it.

    Raises:
        ModelError: bitsandbytes has repacked the weight for a CPU.
    """
    if getattr(state, "packing_format_for_cpu", False):
        raise ModelError(
            "this 4-bit weight was repacked by bitsandbytes' own forward in eval mode on this CPU, and this "
            "cannot be undone exactly; load the base again, and add the adapter before running the model"
        )
    shape, block_size = torch.Size(state.shape), state.blocksize
    packed = weight.detach().view(torch.uint8).reshape(-1)
    if on_cuda(packed) and dtype in KERNEL_DTYPES and _is_doubly_quantized_nf4(state):
        inner = state.state2
        with announce(Allocation.DEQUANTIZATION):
            out = torch.empty(shape, dtype=dtype, device=packed.device)
        DEQUANTIZE(
            out, packed, state.absmax, inner.absmax, inner.code, state.offset, state.code,
            block_size, inner.blocksize,
        )  # fmt: skip
        return out
    absmax, rows = _absmax(state), shape
    if packed.device.type == "cpu" and shape[-1] % block_size != 0:
        # The CPU kernel derives a block's absmax from row and column, which is right only if no block crosses
        # rows. So every block is passed as a row; the last one is padded.
        rows = torch.Size((absmax.numel(), block_size))
        packed = F.pad(packed, (0, rows[0] * rows[1] // 2 - packed.numel()))
    written = dtype if dtype in KERNEL_DTYPES else torch.float32
    values: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
        packed, absmax, block_size, state.quant_type, rows, written
    )
    return values.view(-1)[: shape.numel()].view(shape).to(dtype)


def dense(weight: Tensor, state: QuantState | None, dtype: torch.dtype) -> Tensor:
    """Return the frozen weight [out, in] in `dtype`: dequantized if it has a quant state, else cast."""
    return weight.detach().to(dtype) if state is None else dequantize(weight, state, dtype)


def to_tensors(weight: Params4bit) -> dict[str, Tensor]:
    """Return a quantized weight in bitsandbytes' file format: packed bytes as "", statistics as ".absmax" and so on.

    Each key is a suffix to the weight's name; `transformers` reads a file of such tensors as an NF4 checkpoint.
    """
    statistics = weight.quant_state.as_dict(packed=True)
    return {"": weight.data, **{f".{name}": tensor for name, tensor in statistics.items()}}


def from_tensors(tensors: Mapping[str, Tensor]) -> Params4bit:
    """Rebuild a weight from `to_tensors`, on its device. Raises ModelError if a part is missing or of another size."""
    packed = tensors[""].contiguous().view(torch.uint8).reshape(-1, 1)  # the file can store them as bf16
    statistics = {name: tensor for name, tensor in tensors.items() if name}
    try:
        state = QuantState.from_dict(statistics, device=packed.device)
    except (KeyError, ValueError) as error:
        raise ModelError(
            f"its statistics are missing or unknown: {error}. Download the model again"
        ) from error
    if problem := why_not_whole(packed, state):
        raise ModelError(f"{problem}. Download the model again")
    return _parameter(packed, state)


def frozen_linear(x: Tensor, weight: Tensor, state: QuantState | None, bias: Tensor | None) -> Tensor:
    """Compute x W^T + bias in x.dtype, for x [..., in] and a frozen weight, packed (with its state) or dense.

    Dequantizes once per pass. The backward computes the gradient of x only, and saves nothing but references.
    """
    assert_frozen(weight, bias)
    y: Tensor = _FrozenLinear.apply(autocast(x), weight, state, bias)
    # Viewed here, because torch forbids a model to change a view made inside a function in place, as Gemma 3n does
    return y.view(*x.shape[:-1], y.shape[-1])


def autocast(x: Tensor) -> Tensor:
    """Cast `x` to the dtype of an enclosing `torch.autocast`; return `x` without one, or if it is float64."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))


def assert_frozen(weight: Tensor, bias: Tensor | None) -> None:
    """Assert that neither weight nor bias asks for a gradient, because our products compute none for a base."""
    wanted = torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad))
    assert not wanted, "the base must be frozen: this product computes no gradient for its weight and bias"


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, state: QuantState | None, bias: Tensor | None) -> Tensor:
        # Attributes, not saved tensors: they are constants of the run, and hooks on saved tensors must not move them
        ctx.weight, ctx.state = weight, state
        bias = None if bias is None else bias.to(x.dtype)
        ctx.shape = x.shape
        return F.linear(x.reshape(-1, x.shape[-1]), dense(weight, state, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        return (grad @ dense(ctx.weight, ctx.state, grad.dtype)).view(ctx.shape), None, None, None


class NF4Linear(Linear4bit):
    """Linear4bit of bitsandbytes with our forward, which computes in the input's dtype.

    Saves and loads like a Linear4bit.

    Args:
        weight: a quantized weight, see `quantize`.
        bias: [out].
    """

    def __init__(self, weight: Params4bit, bias: Tensor | None = None) -> None:
        # Linear4bit's constructor is not called: it makes a new weight, which FakeTensorMode cannot do
        nn.Module.__init__(self)
        self.quant_state = weight.quant_state
        self.out_features, self.in_features = self.quant_state.shape
        self.weight = weight
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.quant_storage, self.compute_dtype, self.compute_type_is_set = weight.dtype, None, False

    @classmethod
    def adopt(cls, linear: Linear4bit) -> Self:
        """Return an NF4Linear that shares the weight, quant state and bias of `linear`."""
        state = quant_state(linear)
        if state is None:
            raise ModelError(
                "this 4-bit layer is not quantized yet; move it to its device first, with model.to(device)"
            )
        linear.weight.quant_state = state
        adopted = cls(linear.weight, linear.bias)
        adopted.compute_dtype = linear.compute_dtype
        return adopted.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in] to [..., out] in x.dtype."""
        return frozen_linear(x, self.weight, quant_state(self), self.bias)


def use_nf4_linears(model: nn.Module) -> nn.Module:
    """Replace every plain Linear4bit of `model` in place by an NF4Linear that shares its weight."""
    if is_nf4(model) and not isinstance(model, NF4Linear):
        return NF4Linear.adopt(model)
    adopted: dict[nn.Module, NF4Linear] = {}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and is_nf4(child) and not isinstance(child, NF4Linear):
                if child not in adopted:
                    adopted[child] = NF4Linear.adopt(child)
                setattr(parent, name, adopted[child])
    return model


def is_nf4(module: nn.Module) -> TypeGuard[Linear4bit]:
    """Return True if `module` has a bitsandbytes 4-bit weight."""
    return isinstance(module, Linear4bit)


def quant_state(module: nn.Linear) -> QuantState | None:
    """Return the quant state of a 4-bit linear; None for a dense linear."""
    # The weight loses its state when a parameter is rebuilt (sharding); the module keeps a second reference
    state = getattr(module.weight, "quant_state", None)
    return getattr(module, "quant_state", None) if state is None else state


def weight_bytes(module: nn.Linear) -> int:
    """Return the stored bytes of a linear's weight without bias; for 4 bits: packed codes, absmax and tables."""
    return module.weight.nbytes + sum(tensor.nbytes for tensor in statistics(module))


def statistics(module: nn.Linear) -> list[Tensor]:
    """Return the tensors that a 4-bit weight needs in addition to its codes: absmax with their scales, and tables.

    The list is empty for a dense weight.
    """
    state = quant_state(module)
    if state is None:
        return []
    inner = [state.state2.absmax, state.state2.code, state.offset] if state.nested else []
    return [state.absmax, state.code, *inner]


def _absmax(state: QuantState) -> Tensor:
    """Return the fp32 absmax [blocks] of a quant state."""
    if not state.nested:
        return state.absmax.float()
    inner = state.state2
    return _inner_absmax(state.absmax, inner.absmax, inner.code, state.offset, inner.blocksize)


def _inner_absmax(absmax: Tensor, scales: Tensor, table: Tensor, offset: Tensor, block_size: int) -> Tensor:
    """Dequantize the 8-bit codes `absmax` to the fp32 absmax [blocks]."""
    values: Tensor = torch.ops.bitsandbytes.dequantize_blockwise(
        absmax, scales, table, block_size, torch.float32
    )
    return values.add_(offset)


def _is_doubly_quantized_nf4(state: QuantState) -> bool:
    return state.nested and state.quant_type == "nf4" and state.state2.blocksize == STATISTICS_BLOCK_SIZE


def _dequantize_nested(
    out: Tensor,
    packed: Tensor,
    absmax: Tensor,
    scales: Tensor,
    table: Tensor,
    offset: Tensor,
    code: Tensor,
    block_size: int,
    statistics_block_size: int,
) -> None:
    """Dequantize into `out` on a GPU with bitsandbytes' kernels: three launches a matrix, via the fp32 absmax."""
    matrices = offset.numel()
    parts = (tensor.view(matrices, -1) for tensor in (packed, absmax, scales, offset))
    for matrix, codes, levels, inner, mean in zip(out.view(matrices, -1), *parts, strict=True):
        values = _inner_absmax(levels, inner, table, mean, statistics_block_size)
        torch.ops.bitsandbytes.dequantize_4bit.out(
            codes, values, block_size, "nf4", matrix.shape, matrix.dtype, out=matrix
        )


def _nested_example(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    """Make a matrix whose last block is not full in either quantization."""
    weight = quantize(torch.randn(130, 300, generator=torch.Generator().manual_seed(0)).to(device))
    state = weight.quant_state
    inner, out = state.state2, torch.empty(130, 300, device=device, dtype=dtype)
    codes = weight.detach().view(torch.uint8).reshape(-1)
    return (
        out, codes, state.absmax, inner.absmax, inner.code, state.offset, state.code,
        state.blocksize, inner.blocksize,
    )  # fmt: skip


DEQUANTIZE = FusedOp(_dequantize_nested, "dequantize", _nested_example, exact=True)


def _state(
    absmax: Tensor, shape: torch.Size, dtype: torch.dtype, block_size: int, double_quant: bool
) -> QuantState:
    """Make the quant state with `absmax` [blocks] fp32, quantized to 8 bits if `double_quant`."""
    common = {"shape": shape, "dtype": dtype, "blocksize": block_size, "quant_type": "nf4"}
    code = torch.tensor(NF4_CODE, device=absmax.device)
    if not double_quant:
        return QuantState(absmax=absmax, code=code, **common)
    offset = absmax.mean()
    table = torch.tensor(DYNAMIC_CODE, device=absmax.device)
    codes, scales = torch.ops.bitsandbytes.quantize_blockwise(absmax - offset, table, STATISTICS_BLOCK_SIZE)
    inner = QuantState(absmax=scales, code=table, blocksize=STATISTICS_BLOCK_SIZE, dtype=torch.float32)
    return QuantState(absmax=codes, code=code, offset=offset, state2=inner, **common)


def _parameter(packed: Tensor, state: QuantState) -> Params4bit:
    if is_fake(packed):  # a fake tensor cannot become a Params4bit, and only its shape matters
        parameter = nn.Parameter(packed, requires_grad=False)
        parameter.quant_state = state  # type: ignore[attr-defined]
        return parameter
    return Params4bit(
        packed,
        requires_grad=False,
        quant_state=state,
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        quant_storage=packed.dtype,
        bnb_quantized=True,
    )


def _check_block_size(block_size: int) -> None:
    if block_size not in BLOCK_SIZES:
        raise UsageError(f"block_size must be one of {', '.join(map(str, BLOCK_SIZES))}, not {block_size}")
