"""Selects the device, and the variant of an operation for the device of a tensor."""

import re
from functools import cache

import torch
from torch import Tensor

from qlora.errors import ModelError, RecipeError, UsageError
from qlora.recipe import Recipe
from qlora.recipe.section import DEVICE_PATTERN
from qlora.runtime import environment, gpu
from qlora.runtime.fake import represented_device

DEVICE_NAME = re.compile(DEVICE_PATTERN)

TOKENS_TOGETHER = 128
"""multiple of tokens for bfloat16 on a CPU. 150 steps of the quickstart took 19.5 s and 0.86 GiB with multiples of 128,
19.7 s with 64, and 23.0 s and 1.53 GiB without (two cores with AVX512-BF16, torch 2.13, 2026-11-29). In float32, where
nothing is compiled, 128 costs 7%"""


def on_cuda(tensor: Tensor) -> bool:
    """Return True if `tensor` is on a GPU, or is a fake tensor in a forecast for a GPU."""
    return represented_device(tensor.device).type == "cuda"


def device_named(name: str) -> torch.device:
    """Return the device called `name`, ready for use: auto, cpu, cuda or cuda:N; auto is the GPU if there is one.

    Raises:
        ModelError: torch cannot use the driver of the GPU.
        UsageError: there is no such device.
    """
    if (problem := _absent(name)) is not None:
        raise UsageError(f"--device {name}: {problem}; leave out --device")
    return _ready(_device(name, "--device cpu"))


def device_of(recipe: Recipe) -> torch.device:
    """Return the device that `training.device` asks for, ready for use.

    Raises:
        ModelError: torch cannot use the driver of the GPU.
        RecipeError: there is no such device.
    """
    name = recipe.training.device
    if (problem := _absent(name)) is not None:
        raise RecipeError(f"training.device: is {name}, but {problem}; set training.device=auto")
    return _ready(_device(name, "training.device=cpu"))


def _device(name: str, instead: str) -> torch.device:
    """Return the device called `name`, which exists; raise ModelError if its driver is unusable."""
    if name != "cpu" and (problem := gpu.unusable_driver()) is not None:
        version = environment.driver_version() or "of unknown version"
        raise ModelError(
            f"{problem} (driver {version}). Update the driver, or install a torch that is built for it "
            f"(https://pytorch.org); {instead} trains without the GPU"
        )
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def _absent(name: str) -> str | None:
    """Say why there is no device called `name`; None if there is one, or if its driver is at fault."""
    if not DEVICE_NAME.fullmatch(name):
        return "devices are called auto, cpu, cuda, cuda:0, cuda:1 and so on"
    if name in ("auto", "cpu") or gpu.unusable_driver() is not None:
        return None
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    names = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return None if name == "cuda" or name in names else f"torch finds only {', '.join(names)}"


def _ready(device: torch.device) -> torch.device:
    """Prepare torch for `device`; a GPU becomes the current one, which every `cuda` without a number means."""
    if device.type == "cuda":
        gpu.sum_in_fp32()
        if device.index is not None:
            torch.cuda.set_device(device)
    return device


def device_name(device: torch.device) -> str:
    """Return the name of a device for the user; among several GPUs also its number."""
    if device.type != "cuda":
        return f"CPU, {environment.cpu_name()}"
    count = torch.cuda.device_count()
    number = torch.cuda.current_device() if device.index is None else device.index
    place = f" (cuda:{number} of {count} GPUs)" if count > 1 else ""
    return f"{torch.cuda.get_device_name(device)}{place}"


@cache
def multiplies_bfloat16() -> bool:
    """Return True if the CPU has bfloat16 instructions; other CPUs emulate them, 8 to 100 times slower."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def automatic_dtype() -> tuple[str, str]:
    """Return the dtype that `base.compute_dtype: auto` gives on this machine, and the reason."""
    if torch.cuda.is_available():
        if gpu.has_bfloat16(torch.device("cuda")):
            return "bfloat16", "torch finds a GPU"
        return "float32", "this GPU has no bfloat16 arithmetic, which begins with compute capability 8.0"
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
