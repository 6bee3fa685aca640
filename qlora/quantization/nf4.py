"""NF4: weights in 4 bits, and the product with them. The only door to bitsandbytes' 4-bit code.

A weight [out, in] is stored flat: 4-bit codes of blocks of `block_size` consecutive values, two codes a byte,
and one fp32 absmax a block. With double quantization the absmax are stored in 8 bits in blocks of 256, which
brings a weight to 0.5 + 1/64 + 4/(64 * 256) = 0.515869 bytes (QLoRA, Dettmers et al. 2023, sections 3.1-3.2).

Two things of bitsandbytes 0.50 are stepped around. `Linear4bit.forward` repacks the weight in place in eval
mode on CPUs with AVX512-BF16 and loses gradients from then on: nothing here calls it. The AVX512
dequantization kernel returns garbage for rows that are no multiple of the block: on a CPU it is given the
blocks as its rows.
"""

from collections.abc import Mapping
from typing import Any, Self, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from qlora.errors import ModelError, UsageError
from qlora.kernels import FusedOp
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
    "protect",
    "quant_state",
    "quantize",
    "statistics",
    "synthetic_weight",
    "to_tensors",
    "weight_bytes",
]

BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
STATISTICS_BLOCK_SIZE = 256
"""Block of the second quantization, that of the absmax; bitsandbytes fixes it."""

SLICE = 2**22
"""Values that are quantized at a time, a multiple of every block size."""

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What bitsandbytes can dequantize to."""

# Tables as plain numbers: a tensor made once under FakeTensorMode would be fake for ever
NF4_CODE: list[float] = get_4bit_type("nf4", device="cpu").tolist()
DYNAMIC_CODE: list[float] = create_dynamic_map().tolist()
NF4_CODE_RMS = (sum(value * value for value in NF4_CODE) / len(NF4_CODE)) ** 0.5


def quantize(weight: Tensor, block_size: int = 64, double_quant: bool = True) -> Params4bit:
    """Quantize `weight` [out, in] to NF4 on its own device; the same bytes as `bitsandbytes.quantize_4bit`.

    Raises ModelError for a weight that is no matrix of floats, UsageError for a block size that does not exist.
    """
    _check_block_size(block_size)
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ModelError(f"NF4 wants a matrix of floats, not {weight.dtype} of shape {tuple(weight.shape)}")
    dtype = weight.dtype if weight.dtype in KERNEL_DTYPES else torch.float32
    weight = weight.detach().to(dtype).contiguous()
    # In slices of whole blocks: on a CPU the kernel's temporaries take four times what it is given
    slices = [
        torch.ops.bitsandbytes.quantize_4bit(part, block_size, "nf4", torch.uint8)
        for part in weight.view(-1).split(SLICE)
    ]
    packed, absmax = (torch.cat(parts) for parts in zip(*slices, strict=True))
    return _parameter(packed, _state(absmax, weight.shape, dtype, block_size, double_quant))


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
    """Random NF4 content of standard deviation `std`, made in 4 bits: no full-precision weight ever exists.

    Codes are uniform (NF4 is built so that a normal weight uses them about equally); absmax vary by a fifth
    around the value that gives `std`. `generator` lives on `device`. Works under FakeTensorMode: nothing
    reads a value.
    """
    _check_block_size(block_size)
    count = out_features * in_features
    packed = torch.empty((count + 1) // 2, 1, dtype=torch.uint8, device=device)
    packed.random_(0, 256, generator=generator)
    # U(0.8, 1.2) over the root of its mean square; by rand, for uniform_ fails on fake CUDA tensors
    absmax = torch.rand(-(count // -block_size), device=device, generator=generator).mul_(0.4).add_(0.8)
    absmax.mul_(std / NF4_CODE_RMS / (1 + 0.4**2 / 12) ** 0.5)
    shape = torch.Size((out_features, in_features))
    return _parameter(packed, _state(absmax, shape, torch.bfloat16, block_size, double_quant))


def dequantize(weight: Tensor, state: QuantState, dtype: torch.dtype) -> Tensor:
    """The weight [out, in] in `dtype`, exact for every width. `weight` holds the packed bytes.

    Reads no value, so it runs under FakeTensorMode. A dtype that bitsandbytes cannot write (float64) is
    reached through float32, which holds every dequantized value exactly as the kernels compute it.
    """
    if getattr(state, "packing_format_for_cpu", False):
        raise ModelError(
            "this 4-bit weight was repacked by bitsandbytes' own forward in eval mode on this CPU, which "
            "cannot be undone exactly: load the base again, and adapt it before running it"
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
        # The CPU kernel finds a block's absmax by its row and its place in the row: right only where no block
        # crosses rows. So its rows are the blocks themselves, the last one filled up.
        rows = torch.Size((absmax.numel(), block_size))
        packed = F.pad(packed, (0, rows[0] * rows[1] // 2 - packed.numel()))
    written = dtype if dtype in KERNEL_DTYPES else torch.float32
    values: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
        packed, absmax, block_size, state.quant_type, rows, written
    )
    return values.view(-1)[: shape.numel()].view(shape).to(dtype)


def dense(weight: Tensor, state: QuantState | None, dtype: torch.dtype) -> Tensor:
    """The frozen weight [out, in] in `dtype`: dequantized if it has a quant state, cast if it has none."""
    return weight.detach().to(dtype) if state is None else dequantize(weight, state, dtype)


def to_tensors(weight: Params4bit) -> dict[str, Tensor]:
    """A quantized weight as bitsandbytes stores it: "" is the packed bytes, ".absmax" and so on the statistics.

    The names go behind that of the weight; `transformers` reads such a file as an NF4 checkpoint.
    """
    statistics = weight.quant_state.as_dict(packed=True)
    return {"": weight.data, **{f".{name}": tensor for name, tensor in statistics.items()}}


def from_tensors(tensors: Mapping[str, Tensor]) -> Params4bit:
    """The weight that `to_tensors` gave, on the device of its bytes. Raises ModelError if a part is missing."""
    packed = tensors[""]
    statistics = {name: tensor for name, tensor in tensors.items() if name}
    try:
        state = QuantState.from_dict(statistics, device=packed.device)
    except (KeyError, ValueError) as error:
        raise ModelError(f"statistics of a 4-bit weight are missing or unknown: {error}") from error
    return _parameter(packed, state)


def frozen_linear(x: Tensor, weight: Tensor, state: QuantState | None, bias: Tensor | None) -> Tensor:
    """y = x W^T + bias, for x [..., in] and a frozen weight, packed (with its state) or dense; in x.dtype.

    One dequantization a pass; the backward, which gives x its gradient, keeps references and nothing else.
    """
    assert_frozen(weight, bias)
    y: Tensor = _FrozenLinear.apply(autocast(x), weight, state, bias)
    return y


def autocast(x: Tensor) -> Tensor:
    """`x` in the dtype that an enclosing `torch.autocast` wants products in; else as it is."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))


def assert_frozen(weight: Tensor, bias: Tensor | None) -> None:
    """Our products give a base no gradient: whoever asks for one must hear of it."""
    wanted = torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad))
    assert not wanted, "the base must be frozen: this product gives its weight and bias no gradient"


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, state: QuantState | None, bias: Tensor | None) -> Tensor:
        # Kept as attributes: constants of the run, which offloading hooks on saved tensors must not move
        ctx.weight, ctx.state = weight, state
        bias = None if bias is None else bias.to(x.dtype)
        y = F.linear(x.reshape(-1, x.shape[-1]), dense(weight, state, x.dtype), bias)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        return grad @ dense(ctx.weight, ctx.state, grad.dtype), None, None, None


class NF4Linear(Linear4bit):
    """bitsandbytes' Linear4bit with our product in place of its forward; computes in the input's dtype.

    Holds `weight` as it is (quantized, see `quantize`) and `bias` [out]; saves and loads as a Linear4bit.
    """

    def __init__(self, weight: Params4bit, bias: Tensor | None = None) -> None:
        # Not Linear4bit's constructor: it makes a weight of its own, which FakeTensorMode cannot do
        nn.Module.__init__(self)
        self.quant_state = weight.quant_state
        self.out_features, self.in_features = self.quant_state.shape
        self.weight = weight
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.quant_storage, self.compute_dtype, self.compute_type_is_set = weight.dtype, None, False

    @classmethod
    def adopt(cls, linear: Linear4bit) -> Self:
        """An NF4Linear that shares the weight, quant state and bias of `linear`."""
        state = quant_state(linear)
        if state is None:
            raise ModelError("this 4-bit layer is not quantized yet: move it to its device first")
        linear.weight.quant_state = state
        adopted = cls(linear.weight, linear.bias)
        adopted.compute_dtype = linear.compute_dtype
        return adopted.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out] in x.dtype."""
        return frozen_linear(x, self.weight, quant_state(self), self.bias)


def protect(model: nn.Module) -> nn.Module:
    """Replace every plain Linear4bit of `model`, in place, by an NF4Linear over the same weight."""
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
    """Whether `module` holds a bitsandbytes 4-bit weight."""
    return isinstance(module, Linear4bit)


def quant_state(module: nn.Linear) -> QuantState | None:
    """The statistics of a 4-bit linear's weight; None for a dense one."""
    # The weight loses its state where a parameter is rebuilt (sharding); the module keeps a second reference
    state = getattr(module.weight, "quant_state", None)
    return getattr(module, "quant_state", None) if state is None else state


def weight_bytes(module: nn.Linear) -> int:
    """Bytes of a linear's weight as stored: for 4 bits the packed codes, absmax and their tables; no bias."""
    return module.weight.nbytes + sum(tensor.nbytes for tensor in statistics(module))


def statistics(module: nn.Linear) -> list[Tensor]:
    """What a 4-bit weight needs besides its codes: absmax, their own statistics, and the tables; else nothing."""
    state = quant_state(module)
    if state is None:
        return []
    inner = [state.state2.absmax, state.state2.code, state.offset] if state.nested else []
    return [state.absmax, state.code, *inner]


def _absmax(state: QuantState) -> Tensor:
    """The fp32 absmax [blocks] of a quant state."""
    if not state.nested:
        return state.absmax.float()
    inner = state.state2
    return _inner_absmax(state.absmax, inner.absmax, inner.code, state.offset, inner.blocksize)


def _inner_absmax(absmax: Tensor, scales: Tensor, table: Tensor, offset: Tensor, block_size: int) -> Tensor:
    """The absmax [blocks] in fp32, of their 8-bit codes `absmax`."""
    found: Tensor = torch.ops.bitsandbytes.dequantize_blockwise(
        absmax, scales, table, block_size, torch.float32
    )
    return found.add_(offset)


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
    """Into `out` [out, in], on a GPU: bitsandbytes' way, three launches with the fp32 absmax between them."""
    found = _inner_absmax(absmax, scales, table, offset, statistics_block_size)
    torch.ops.bitsandbytes.dequantize_4bit.out(
        packed, found, block_size, "nf4", out.shape, out.dtype, out=out
    )


def _nested_example(device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    """A matrix whose last blocks of either quantization are not full."""
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
    """The quant state around `absmax` [blocks] fp32, which is quantized to 8 bits if `double_quant`."""
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
    if is_fake(packed):  # it cannot become a Params4bit: only its shape matters
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
