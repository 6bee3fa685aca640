"""Which device's way a tensor takes through our operations: some do one thing on a GPU and another on a CPU."""

from functools import cache

import torch
from torch import Tensor

from qlora.errors import UsageError
from qlora.runtime.fake import stood_for

TOKENS_TOGETHER = 128
"""150 steps of the quickstart took 19.5 s and 0.86 GiB with multiples of 128, 19.7 s with 64, and 23.0 s and 1.53 GiB
with none (two cores with AVX512-BF16, torch 2.13, 2026-11-29). In float32, where nothing is compiled, 128 costs 7%"""


def on_cuda(tensor: Tensor) -> bool:
    """Whether `tensor` lives on a GPU, or stands for one that does."""
    return stood_for(tensor.device).type == "cuda"


def device_named(name: str) -> torch.device:
    """The device that `name` (auto, cpu or cuda) asks for; auto is the GPU where there is one.

    Raises UsageError if there is no CUDA device and cuda was asked for.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("there is no CUDA device here: leave --device out")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


@cache
def multiplies_bfloat16() -> bool:
    """Whether this machine's CPU multiplies bfloat16 in hardware; others emulate it, 8 to 100 times slower."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def tokens_together(device: torch.device, dtype: torch.dtype) -> int:
    """Return the multiple to which the tokens of a pass over documents are filled up; 1 leaves them as they are.

    Where a CPU multiplies bfloat16, oneDNN compiles a product for each new number of tokens, and documents that lie end
    to end have another number in each step. Other devices and dtypes compile nothing.

    LoRA's dropout draws the same mask for the tokens that are learned from. A model's own dropout, which OPT has for
    one, draws other numbers than without the filler.
    """
    compiled = stood_for(device).type == "cpu" and dtype == torch.bfloat16
    return TOKENS_TOGETHER if compiled and multiplies_bfloat16() else 1
