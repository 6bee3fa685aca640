"""The frozen matrices of one projection for all experts of a layer: dense, or each in NF4.

transformers keeps a projection of all experts as one parameter with three dimensions, which bitsandbytes' loader leaves
in 16 bits. An `ExpertStack` holds the same numbers as a module. In NF4 each matrix is quantized for itself, to the
bytes that `nf4.quantize` gives for it, so no block and no statistic covers two experts.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from qlora.errors import ModelError
from qlora.quantization import nf4
from qlora.runtime.device import on_cuda
from qlora.runtime.fake import is_fake
from qlora.runtime.phases import Allocation, announce

PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")
"""names of the parameters of transformers' experts, in the order in which the models declare them"""


class PackedStack(NamedTuple):
    """Matrices in NF4 with their statistics; the first dimension of each tensor numbers the experts."""

    codes: Tensor
    """[E, ceil(rows * columns / 2)] uint8"""
    absmax: Tensor
    """[E, blocks]; uint8 codes with double quantization, else fp32"""
    scales: Tensor | None
    """[E, ceil(blocks / 256)] fp32: the absmax of the absmax; None without double quantization"""
    offsets: Tensor | None
    """[E] fp32: the mean of an expert's absmax; None without double quantization"""
    shape: tuple[int, int]
    """rows and columns of a matrix, as stored"""
    block_size: int
    dtype: torch.dtype
    """dtype that the matrices were quantized from"""

    def state(self, expert: int, code: Tensor, table: Tensor | None) -> nf4.QuantState:
        """Return the quant state of one matrix; `code` and `table` are the values of the codes."""
        inner: dict[str, Any] = {}
        if self.scales is not None and self.offsets is not None:
            scales = nf4.QuantState(
                absmax=self.scales[expert],
                code=table,
                blocksize=nf4.STATISTICS_BLOCK_SIZE,
                dtype=torch.float32,
            )
            inner = {"offset": self.offsets[expert], "state2": scales}
        return nf4.QuantState(
            absmax=self.absmax[expert],
            code=code,
            shape=torch.Size(self.shape),
            dtype=self.dtype,
            blocksize=self.block_size,
            quant_type="nf4",
            **inner,
        )


class ExpertStack(nn.Module):
    """The frozen matrices of one projection for all experts of a layer.

    It is no layer that is called; `qlora.ops.experts` multiplies with one matrix at a time.

    Args:
        weight: dense [E, out, in], or [E, in, out] if `transposed`; or in NF4.
        bias: [E, out].
        transposed: True if the matrices are stored as [in, out].
        active: number of experts that a token passes through.

    Attributes:
        weight: the dense matrices, or the codes [E, bytes] of NF4.
    """

    weight: nn.Parameter

    def __init__(
        self,
        weight: Tensor | PackedStack,
        bias: Tensor | None = None,
        *,
        transposed: bool = False,
        active: int = 1,
    ) -> None:
        super().__init__()
        self.transposed, self.active = transposed, active
        self.absmax: Tensor
        self.scales: Tensor | None
        self.offsets: Tensor | None
        self.code: Tensor
        self.table: Tensor | None
        self.packed = isinstance(weight, PackedStack)
        """True if the matrices are in NF4"""
        if isinstance(weight, PackedStack):
            self._settings = weight._replace(codes=None, absmax=None, scales=None, offsets=None)  # type: ignore[arg-type]
            rows, columns = weight.shape
            self.experts = len(weight.codes)
            self.weight = nn.Parameter(weight.codes, requires_grad=False)
            device = weight.codes.device
            self.register_buffer("absmax", weight.absmax)
            self.register_buffer("scales", weight.scales)
            self.register_buffer("offsets", weight.offsets)
            self.register_buffer("code", torch.tensor(nf4.NF4_CODE, device=device))
            table = None if weight.scales is None else torch.tensor(nf4.DYNAMIC_CODE, device=device)
            self.register_buffer("table", table)
        else:
            self.experts, rows, columns = weight.shape
            self.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, False)
        self.out_features, self.in_features = (columns, rows) if transposed else (rows, columns)
        self.bias = (
            bias
            if bias is None or isinstance(bias, nn.Parameter)
            else nn.Parameter(bias, requires_grad=False)
        )

    @property
    def storage(self) -> PackedStack:
        """The matrices in NF4 with their statistics."""
        assert self.packed, "the matrices are dense"
        return self._settings._replace(
            codes=self.weight.data, absmax=self.absmax, scales=self.scales, offsets=self.offsets
        )

    def matrix(self, expert: int, dtype: torch.dtype) -> Tensor:
        """Return the matrix [out, in] of one expert in `dtype`, dequantized or a view."""
        if self.packed:
            packed = self.storage
            values = nf4.dequantize(packed.codes[expert], packed.state(expert, self.code, self.table), dtype)
        else:
            values = self.weight.detach()[expert].to(dtype)
        return values.T if self.transposed else values

    def matrices(self, experts: slice, dtype: torch.dtype) -> Tensor:
        """Return the matrices [G, out, in] of consecutive experts in `dtype`, dequantized or a view."""
        numbers = range(self.experts)[experts]
        if not self.packed:
            values = self.weight.detach()[experts].to(dtype)
        elif len(numbers) == 1:
            return self.matrix(numbers[0], dtype)[None]
        else:
            values = _dequantized(self.storage, experts, self.code, self.table, dtype)
        return values.transpose(1, 2) if self.transposed else values

    def numel(self) -> int:
        """Return the number of weights."""
        return self.experts * self.out_features * self.in_features

    def storage_bytes(self) -> int:
        """Return the stored bytes of the weights without bias; in NF4 with their statistics."""
        return self.weight.nbytes + sum(tensor.nbytes for tensor in self.statistics())

    def statistics(self) -> list[Tensor]:
        """Return the tensors that NF4 needs in addition to the codes; empty for dense matrices."""
        if not self.packed:
            return []
        tensors = (self.absmax, self.scales, self.offsets, self.code, self.table)
        return [tensor for tensor in tensors if tensor is not None]

    def quantized(self, block_size: int, double_quant: bool) -> Self:
        """Return a stack with these matrices in NF4; a stack in NF4 returns itself."""
        if self.packed:
            return self
        packed = quantize(self.weight, block_size, double_quant)
        return type(self)(packed, self.bias, transposed=self.transposed, active=self.active)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Store dense matrices under the names of transformers' parameters, which have no `weight` at the end."""
        if self.packed:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            return
        name = prefix.removesuffix(".")
        destination[name] = self.weight if keep_vars else self.weight.detach()
        if self.bias is not None:
            destination[f"{name}_bias"] = self.bias if keep_vars else self.bias.detach()

    def extra_repr(self) -> str:
        """Return the sizes for print(model)."""
        return (
            f"experts={self.experts}, in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {'NF4' if self.packed else 'dense'}"
        )

    def forward(self, *_: Any) -> Tensor:
        """Raise an error: the module is not called."""
        raise ModelError("the model calls the projection of experts by itself, which qlora does not support")


def _dequantized(
    packed: PackedStack, experts: slice, code: Tensor, table: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Dequantize the matrices [G, rows, columns] of consecutive experts; on a GPU with one kernel if they allow it."""
    codes, scales, offsets = packed.codes[experts], packed.scales, packed.offsets
    with announce(Allocation.DEQUANTIZATION):
        out = torch.empty(len(codes), *packed.shape, dtype=dtype, device=codes.device)
    whole_blocks = packed.shape[0] * packed.shape[1] % packed.block_size == 0
    if (
        scales is not None
        and offsets is not None
        and on_cuda(codes)
        and dtype in nf4.KERNEL_DTYPES
        and whole_blocks
    ):
        nf4.DEQUANTIZE(
            out, codes, packed.absmax[experts], scales[experts], table, offsets[experts], code,
            packed.block_size, nf4.STATISTICS_BLOCK_SIZE,
        )  # fmt: skip
        return out
    for expert, matrix in zip(range(len(packed.codes))[experts], out, strict=True):
        matrix.copy_(nf4.dequantize(packed.codes[expert], packed.state(expert, code, table), dtype))
    return out


def quantize(matrices: Tensor, block_size: int = 64, double_quant: bool = True) -> PackedStack:
    """Quantize matrices [E, rows, columns] to NF4 one by one, each to the bytes that `nf4.quantize` gives for it.

    Raises:
        ModelError: these are not matrices of floats.
        UsageError: `block_size` is none that NF4 has.
    """
    if matrices.ndim != 3:
        raise ModelError(f"experts need matrices [E, rows, columns], not {list(matrices.shape)}")
    return stacked([nf4.quantize(matrix, block_size, double_quant) for matrix in matrices.detach()])


def rounded(matrices: Tensor, block_size: int = 64, double_quant: bool = True) -> Tensor:
    """Return the values of matrices [E, rows, columns] after quantization to NF4, in fp32."""
    return torch.stack([nf4.rounded(matrix, block_size, double_quant) for matrix in matrices.detach()])


def stacked(weights: Sequence[nf4.Params4bit]) -> PackedStack:
    """Return equally large matrices in NF4 as one stack, without a change of their bytes."""
    states = [weight.quant_state for weight in weights]
    first = states[0]
    nested = first.nested
    rows, columns = first.shape
    return PackedStack(
        codes=torch.stack([weight.data.view(torch.uint8).reshape(-1) for weight in weights]),
        absmax=torch.stack([state.absmax for state in states]),
        scales=torch.stack([state.state2.absmax for state in states]) if nested else None,
        offsets=torch.stack([state.offset for state in states]) if nested else None,
        shape=(rows, columns),
        block_size=first.blocksize,
        dtype=first.dtype,
    )


def synthetic_stack(
    shape: Sequence[int],
    *,
    block_size: int = 64,
    double_quant: bool = True,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
    std: float = 0.02,
) -> PackedStack:
    """Make random matrices [E, rows, columns] in NF4, as `nf4.synthetic_weight` makes one; works on fake tensors."""
    experts, rows, columns = shape
    one = {"block_size": block_size, "double_quant": double_quant, "device": device, "std": std}
    if is_fake(torch.empty(0, device=device)):  # equal shapes: one matrix tells all
        first = nf4.synthetic_weight(rows, columns, generator=generator, **one)  # type: ignore[arg-type]
        return stacked([first] * experts)
    made = (nf4.synthetic_weight(rows, columns, generator=generator, **one) for _ in range(experts))  # type: ignore[arg-type]
    return stacked(list(made))


def as_parameter(packed: PackedStack) -> nn.Parameter:
    """Return the codes as a parameter for one of transformers' expert modules, with all of `packed` as an attribute."""
    codes = nn.Parameter(packed.codes, requires_grad=False)
    codes.packed = packed  # type: ignore[attr-defined]
    return codes


def is_experts(module: Any) -> bool:
    """Return True if `module` is one of transformers' expert modules whose computation is known here.

    transformers 5 has one interface for the experts of its models (`use_experts_implementation`). It sets the flags on
    the module, and calls it with tokens, choices and routing weights.
    """
    own = [module._parameters[name] for name in PROJECTIONS if module._parameters.get(name) is not None]
    decorated = all(hasattr(module, flag) for flag in ("has_gate", "has_bias", "is_transposed"))
    known = len(own) == 2 and all(weight.ndim == 3 or hasattr(weight, "packed") for weight in own)
    return decorated and known and not getattr(module, "has_post_expert_norm", False)


def expert_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the name and value of each projection in transformers' expert modules, in the order of the model."""
    for name, module in model.named_modules():
        if is_experts(module):
            for projection in PROJECTIONS:
                if (weight := module._parameters.get(projection)) is not None:
                    yield f"{name}.{projection}", weight


def expert_stacks(model: nn.Module) -> dict[str, ExpertStack]:
    """Return the stacks of `model` by name, in the order of the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ExpertStack)}
