"""Selects the device, and the variant of an operation for the device of a tensor."""

from functools import cache

import torch
from torch import Tensor

from qlora.errors import UsageError
from qlora.runtime.fake import represented_device

TOKENS_TOGETHER = 128
"""multiple of tokens for bfloat16 on a CPU. 150 steps of the quickstart took 19.5 s and 0.86 GiB with multiples of 128,
19.7 s with 64, and 23.0 s and 1.53 GiB without (two cores with AVX512-BF16, torch 2.13, 2026-11-29). In float32, where
nothing is compiled, 128 costs 7%"""


def on_cuda(tensor: Tensor) -> bool:
    """Return True if `tensor` is on a GPU, or is a fake tensor in a forecast for a GPU."""
    return represented_device(tensor.device).type == "cuda"


def device_named(name: str) -> torch.device:
    """Return the device called `name`: auto, cpu or cuda; auto is the GPU if there is one.

    Raises:
        UsageError: `name` is cuda, and there is no CUDA device.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no CUDA device; leave out --device")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


@cache
def multiplies_bfloat16() -> bool:
    """Return True if the CPU has bfloat16 instructions; other CPUs emulate them, 8 to 100 times slower."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def automatic_dtype() -> tuple[str, str]:
    """Return the dtype that `base.compute_dtype: auto` gives on this machine, and the reason."""
    if torch.cuda.is_available():
        return "bfloat16", "torch finds a GPU"
    if multiplies_bfloat16():
        return "bfloat16", "this CPU multiplies bfloat16 in hardware"
    return "float32", "this CPU would emulate bfloat16, which is 8 to 100 times slower"


def token_multiple(device: torch.device, dtype: torch.dtype) -> int:
    """Return the multiple to which the number of tokens in a pass over documents is padded; 1 means no padding.

    For bfloat16 on a CPU that supports it, oneDNN compiles a kernel for each new number of tokens, and this number
    differs in each step when documents are placed end to end. Other devices and dtypes compile nothing.

    The padding does not change LoRA's dropout mask of the real tokens. The dropout of the model itself (OPT, for
    example) draws other numbers with padding.
    """
    compiled = represented_device(device).type == "cpu" and dtype == torch.bfloat16
    return TOKENS_TOGETHER if compiled and multiplies_bfloat16() else 1
