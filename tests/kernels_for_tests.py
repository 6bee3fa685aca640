"""Compiles every kernel to machine code for the GPUs named on the command line (80 90 ...), without a GPU.

Runs each pass on its example and on arguments as in a training step, catches the launches and compiles them. Triton's
specialisation on the values of numbers is left out. Prints one line a kernel. Run it in a process without Triton's
interpreter.
"""

import sys
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from qlora.kernels import cross_entropy, gate, norm, rotary
from qlora.quantization import nf4

POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.uint8: "*u8", torch.int64: "*i64",
}  # fmt: skip
OPTIONS = ("num_warps", "enable_fp_fusion")


def catch(launches: list[tuple[Any, ...]]) -> None:
    """Record launches from now on, instead of running them."""

    def run(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append((self, args, kwargs))

    JITFunction.run = run


def compiled(kernel: JITFunction[Any], args: tuple[Any, ...], kwargs: dict[str, Any], target: int) -> str:
    """Return the kernel's machine code for this launch."""
    options = {name: kwargs[name] for name in OPTIONS if name in kwargs}
    named = dict(zip(kernel.arg_names, args, strict=False)) | {
        name: value for name, value in kwargs.items() if name not in options
    }
    constants = {
        name: named[name] for name in named if kernel.params[kernel.arg_names.index(name)].is_constexpr
    }
    signature = {name: "constexpr" if name in constants else kind(named[name]) for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options).asm["cubin"]


def kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return POINTERS[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


if __name__ == "__main__":
    launches: list[tuple[Any, ...]] = []
    catch(launches)
    passes = [
        gate.SILU_PRODUCT, gate.SILU_GRADIENTS, norm.NORMALIZE, norm.NORMALIZE_LATE, norm.NORMALIZE_GRADIENT,
        rotary.ROTATE, cross_entropy.LOSS, nf4.DEQUANTIZE,
    ]  # fmt: skip
    for work in passes:
        dtype = torch.float32 if work is cross_entropy.LOSS else torch.bfloat16
        work.in_triton(*work.example(torch.device("cpu"), dtype))
    rows = torch.empty(2, 16384, dtype=torch.bfloat16)
    norm.NORMALIZE.in_triton(rows, torch.empty(16384), 1e-5, rows)  # wide rows and an fp32 weight
    norm.NORMALIZE_GRADIENT.in_triton(rows, rows, torch.empty(16384), 1e-5, None)
    logits, targets = torch.empty(2, 151936), torch.zeros(2, dtype=torch.int64)
    for gradient in (torch.empty(2, 151936, dtype=torch.bfloat16), None):
        cross_entropy.LOSS.in_triton(logits, targets, None, 1.0, gradient, torch.empty(2))
    for kernel, args, kwargs in launches:
        for target in map(int, sys.argv[1:]):
            print(kernel.fn.__name__, target, len(compiled(kernel, args, kwargs, target)))
