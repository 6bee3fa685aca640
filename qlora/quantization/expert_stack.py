"""The frozen matrices of one projection for all experts of a layer: dense, or each in NF4.

transformers keeps a projection of all experts as one parameter with three dimensions, which bitsandbytes' loader leaves
in 16 bits. An `ExpertStack` holds the same numbers as a module. In NF4 each matrix is quantized for itself, to the
bytes that `nf4.quantize` gives for it, so no block and no statistic covers two experts.
"""

from collections.abc import Iterator, Mapping, Sequence
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

STATISTICS = ("absmax", "scales", "offsets", "code", "table")
"""what a stack in NF4 has in addition to its codes"""


class PackedStack(NamedTuple):
    """M matrices in NF4 with their statistics.

    An expert is one matrix, or `parts` matrices that were quantized apart and lie one below the other, as gate and up
    in a checkpoint with a 4-bit matrix for each. Those of the first expert come first.
    """

    codes: Tensor
    """[M, ceil(rows * columns / 2)] uint8"""
    absmax: Tensor
    """[M, blocks]; uint8 codes with double quantization, else fp32"""
    scales: Tensor | None
    """[M, ceil(blocks / 256)] fp32: the absmax of the absmax; None without double quantization"""
    offsets: Tensor | None
    """[M] fp32: the mean of a matrix's absmax; None without double quantization"""
    code: Tensor
    """[16] fp32: values of the codes"""
    table: Tensor | None
    """[256] fp32: values of the codes of the absmax; None without double quantization"""
    shape: tuple[int, int]
    """rows and columns of a matrix, as stored"""
    block_size: int
    dtype: torch.dtype
    """dtype that the matrices were quantized from"""
    parts: int = 1
    """matrices an expert"""

    @property
    def experts(self) -> int:
        """Number of experts."""
        return len(self.codes) // self.parts

    def tensors(self) -> dict[str, Tensor]:
        """Return the codes and statistics by the names of their fields, without those that are None."""
        return {name: value for name, value in self._asdict().items() if isinstance(value, Tensor)}

    def copied(self, device: torch.device | str) -> Self:
        """Return a stack with copies of the tensors on `device`, so that none is a view of a file."""
        copies: Any = {name: tensor.to(device, copy=True) for name, tensor in self.tensors().items()}
        return self._replace(**copies)

    def matrices(self, experts: slice, dtype: torch.dtype) -> Tensor:
        """Return the dequantized matrices [G, parts * rows, columns] of consecutive experts.

        On a GPU one kernel dequantizes them if they have whole blocks.
        """
        first, end, _ = experts.indices(self.experts)
        own = slice(first * self.parts, end * self.parts)
        codes, scales, offsets = self.codes[own], self.scales, self.offsets
        if len(codes) == 1:
            return nf4.dequantize(codes[0], self._state(own.start), dtype)[None]
        with announce(Allocation.DEQUANTIZATION):
            out = torch.empty(len(codes), *self.shape, dtype=dtype, device=codes.device)
        whole_blocks = self.shape[0] * self.shape[1] % self.block_size == 0
        kernel = on_cuda(codes) and dtype in nf4.KERNEL_DTYPES and whole_blocks
        if kernel and scales is not None and offsets is not None:
            nf4.DEQUANTIZE(
                out, codes, self.absmax[own], scales[own], self.table, offsets[own], self.code,
                self.block_size, nf4.STATISTICS_BLOCK_SIZE,
            )  # fmt: skip
        else:
            for number, matrix in enumerate(out, own.start):
                matrix.copy_(nf4.dequantize(self.codes[number], self._state(number), dtype))
        return out.view(end - first, self.parts * self.shape[0], self.shape[1])

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the dequantized matrices [E, parts * rows, columns] of all experts."""
        return self.matrices(slice(None), dtype)

    def _state(self, number: int) -> nf4.QuantState:
        """Return the quant state of one matrix."""
        inner: dict[str, Any] = {}
        if self.scales is not None and self.offsets is not None:
            scales = nf4.QuantState(
                absmax=self.scales[number],
                code=self.table,
                blocksize=nf4.STATISTICS_BLOCK_SIZE,
                dtype=torch.float32,
            )
            inner = {"offset": self.offsets[number], "state2": scales}
        return nf4.QuantState(
            absmax=self.absmax[number],
            code=self.code,
            shape=torch.Size(self.shape),
            dtype=self.dtype,
            blocksize=self.block_size,
            quant_type="nf4",
            **inner,
        )


class ExpertStack(nn.Module):
    """The frozen matrices of one projection for all experts of a layer.

    It is no layer that is called; `qlora.ops.experts` multiplies with its matrices.

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
            nothing: Any = dict.fromkeys(weight.tensors())
            self._settings = weight._replace(**nothing)
            rows, columns = weight.parts * weight.shape[0], weight.shape[1]
            self.experts = weight.experts
            self.weight = nn.Parameter(weight.codes, requires_grad=False)
            for name in STATISTICS:
                self.register_buffer(name, getattr(weight, name))
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
    def stored_shape(self) -> tuple[int, int, int]:
        """Shape of transformers' parameter: [E, out, in], or [E, in, out] if the matrices are transposed."""
        sizes = self.out_features, self.in_features
        return (self.experts, *(sizes[::-1] if self.transposed else sizes))

    @property
    def storage(self) -> PackedStack:
        """The matrices in NF4 with their statistics."""
        assert self.packed, "the matrices are dense"
        return self._settings._replace(
            codes=self.weight.data, absmax=self.absmax, scales=self.scales, offsets=self.offsets, code=self.code,
            table=self.table,
        )  # fmt: skip

    def matrix(self, expert: int, dtype: torch.dtype) -> Tensor:
        """Return the matrix [out, in] of one expert in `dtype`, dequantized or a view."""
        return self.matrices(slice(expert, expert + 1), dtype)[0]

    def matrices(self, experts: slice, dtype: torch.dtype) -> Tensor:
        """Return the matrices [G, out, in] of consecutive experts in `dtype`, dequantized or a view."""
        values = (
            self.storage.matrices(experts, dtype) if self.packed else self.weight.detach()[experts].to(dtype)
        )
        return values.transpose(1, 2) if self.transposed else values

    def numel(self) -> int:
        """Return the number of weights."""
        return self.experts * self.out_features * self.in_features

    def storage_bytes(self) -> int:
        """Return the stored bytes of the weights without bias; in NF4 with their statistics."""
        return self.weight.nbytes + sum(tensor.nbytes for tensor in self.statistics())

    def statistics(self) -> list[Tensor]:
        """Return the tensors that NF4 needs in addition to the codes; empty for dense matrices."""
        return [*self.buffers(recurse=False)] if self.packed else []

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


def stacked(weights: Sequence[nf4.Params4bit], parts: int = 1) -> PackedStack:
    """Return equally large matrices in NF4, `parts` an expert, as one stack, without a change of their bytes."""
    states = [weight.quant_state for weight in weights]
    first = states[0]
    nested = first.nested
    rows, columns = first.shape
    return PackedStack(
        codes=torch.stack([weight.data.view(torch.uint8).reshape(-1) for weight in weights]),
        absmax=torch.stack([state.absmax for state in states]),
        scales=torch.stack([state.state2.absmax for state in states]) if nested else None,
        offsets=torch.stack([state.offset for state in states]) if nested else None,
        code=first.code,
        table=first.state2.code if nested else None,
        shape=(rows, columns),
        block_size=first.blocksize,
        dtype=first.dtype,
        parts=parts,
    )


def synthetic_stack(
    shape: Sequence[int],
    *,
    parts: int = 1,
    block_size: int = 64,
    double_quant: bool = True,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
    std: float = 0.02,
) -> PackedStack:
    """Make random matrices [E, rows, columns] in NF4, as `nf4.synthetic_weight` makes one; works on fake tensors.

    parts: matrices an expert, which are quantized apart.
    """
    experts, rows, columns = shape[0] * parts, shape[1] // parts, shape[2]
    one = {"block_size": block_size, "double_quant": double_quant, "device": device, "std": std}
    if is_fake(torch.empty(0, device=device)):  # equal shapes: one matrix tells all
        first = nf4.synthetic_weight(rows, columns, generator=generator, **one)  # type: ignore[arg-type]
        return stacked([first] * experts, parts)
    made = (nf4.synthetic_weight(rows, columns, generator=generator, **one) for _ in range(experts))  # type: ignore[arg-type]
    return stacked(list(made), parts)


def as_parameter(packed: PackedStack) -> nn.Parameter:
    """Return the codes as a parameter for one of transformers' expert modules, with all of `packed` as an attribute."""
    codes = nn.Parameter(packed.codes, requires_grad=False)
    codes.packed = packed  # type: ignore[attr-defined]
    return codes


LIKE_THE_INTERFACE: Mapping[str, Mapping[str, bool]] = {
    "Llama4TextExperts": {
        "has_gate": True,
        "has_bias": False,
        "is_transposed": True,
        "is_concatenated": True,
    },
    "LongcatFlashExperts": {
        "has_gate": True,
        "has_bias": False,
        "is_transposed": False,
        "is_concatenated": True,
    },
}
"""expert modules of transformers that do not follow its interface but could: class -> the flags of the interface"""


def is_experts(module: Any) -> bool:
    """Return True if `module` is one of transformers' expert modules whose computation is known here.

    transformers 5 has one interface for the experts of its models (`use_experts_implementation`). It sets the flags on
    the module, and calls it with tokens, choices and routing weights. The classes of `LIKE_THE_INTERFACE` get the flags
    here.
    """
    for flag, value in LIKE_THE_INTERFACE.get(type(module).__name__, {}).items():
        setattr(type(module), flag, value)
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
