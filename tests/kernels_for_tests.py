"""Compiles every kernel to machine code for the GPUs named on the command line (80 90 ...), without a GPU.

    python tests/kernels_for_tests.py [--every-dtype] 80 90

Runs each pass on its example and on arguments as in a training step, catches the launches and compiles them as a launch
does: with 16-byte alignment and numbers that are multiples of 16 known, and numbers that are 1 as constants. Without
--every-dtype only in bfloat16. Prints a line for each kernel and GPU: name, dtype of the first tensor, GPU, bytes. Run
it in a process without Triton's interpreter.
"""

import sys
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from qlora.kernels import cross_entropy, gate, grouped, norm, rotary
from qlora.quantization import nf4

POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.uint8: "*u8", torch.int64: "*i64",
}  # fmt: skip
OPTIONS = ("num_warps", "enable_fp_fusion")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def catch(launches: list[tuple[Any, ...]]) -> None:
    """Record launches from now on, instead of running them."""

    def run(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append((self, args, kwargs))

    JITFunction.run = run


def compiled(kernel: JITFunction[Any], args: tuple[Any, ...], kwargs: dict[str, Any], target: int) -> bytes:
    """Return the kernel's machine code for this launch."""
    options = {name: kwargs[name] for name in OPTIONS if name in kwargs}
    named = dict(zip(kernel.arg_names, args, strict=False)) | {
        name: value for name, value in kwargs.items() if name not in options
    }
    constants = {
        name: named[name]
        for name, parameter in zip(kernel.arg_names, kernel.params, strict=True)
        if parameter.is_constexpr or (type(named[name]) is int and named[name] == 1)
    }
    signature = {name: "constexpr" if name in constants else kind(named[name]) for name in kernel.arg_names}
    attributes = {
        (number,): [["tt.divisibility", 16]]
        for number, name in enumerate(kernel.arg_names)
        if name not in constants and aligned(named[name])
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options).asm["cubin"]


def kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return POINTERS[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def aligned(value: Any) -> bool:
    """Return True for tensors, which torch's allocator aligns, and for multiples of 16."""
    return isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0)


def launch(dtype: torch.dtype) -> None:
    """Launch every pass in this dtype, as its check does and as a training step does."""
    cpu = torch.device("cpu")
    passes = [
        gate.SILU_PRODUCT, gate.SILU_GRADIENTS, norm.NORMALIZE, norm.NORMALIZE_LATE, norm.NORMALIZE_GRADIENT,
        rotary.ROTATE, rotary.ROTATE_PAIRS, cross_entropy.LOSS, grouped.PRODUCT, grouped.OUTER, nf4.DEQUANTIZE,
    ]  # fmt: skip
    for work in passes:
        work.in_triton(*work.example(cpu, dtype))
    rows = torch.empty(2, 16384, dtype=dtype)
    norm.NORMALIZE.in_triton(rows, torch.empty(16384), 1e-5, rows)  # wide rows and an fp32 weight
    norm.NORMALIZE_GRADIENT.in_triton(rows, rows, torch.empty(16384), 1e-5, None)
    heads, angles = torch.empty(1, 64, 32, 128, dtype=dtype), torch.empty(1, 64, 128, dtype=dtype)
    rotary.ROTATE.in_triton(heads, angles, angles, 1, heads, False)
    logits, targets = torch.empty(2, 151936), torch.zeros(2, dtype=torch.int64)
    for gradient in (torch.empty(2, 151936, dtype=dtype), None):
        cross_entropy.LOSS.in_triton(logits, targets, None, 1.0, gradient, torch.empty(2))


if __name__ == "__main__":
    launches: list[tuple[Any, ...]] = []
    catch(launches)
    for dtype in DTYPES if "--every-dtype" in sys.argv else DTYPES[:1]:
        launch(dtype)
    for kernel, args, kwargs in launches:
        for target in sys.argv[1:]:
            if target.isdigit():
                size = len(compiled(kernel, args, kwargs, int(target)))
                print(kernel.fn.__name__, str(args[0].dtype).removeprefix("torch."), target, size)
