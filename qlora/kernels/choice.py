"""Which form of a pass runs: the kernel where it is proven on this very device, else plain torch."""

import os
import warnings
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from qlora.device import on_cuda

Form = Callable[..., None]
Example = Callable[[torch.device, torch.dtype], tuple[Any, ...]]

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Of what a proof compares, relative to the largest number: rounding, and the order of sums."""


class Pass:
    """A pass over memory in two forms, which write into (some of) the tensors that they are given.

    plain: in torch. kernel: its name in `in_triton`. example: small arguments to compare the two on; their
    number of rows and columns should be no power of two.
    """

    def __init__(self, plain: Form, kernel: str, example: Example) -> None:
        self.plain, self.kernel, self.example = plain, kernel, example

    def __call__(self, *arguments: Any) -> None:
        first: Tensor = arguments[0]
        if not on_cuda(first) or first.dtype not in TOLERANCE or not enabled():
            self.plain(*arguments)
        elif isinstance(first, FakeTensor):
            pass  # a forecast: the kernel takes no memory but its arguments
        elif proven(self, first.device, first.dtype):
            self.in_triton(*arguments)
        else:
            self.plain(*arguments)

    @property
    def in_triton(self) -> Form:
        """The kernel, launched. Raises ImportError where there is no Triton."""
        return getattr(kernels(), self.kernel)


def enabled() -> bool:
    """Whether kernels are wanted at all: QLORA_KERNELS=off in the environment says no."""
    return os.environ.get("QLORA_KERNELS") != "off"


def kernels() -> ModuleType:
    """The file of the kernels; imported late, for Triton does not exist everywhere."""
    from qlora.kernels import in_triton

    return in_triton


@cache
def proven(work: Pass, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel, on this device, does what the plain form does. Says so, once, where it does not."""
    try:
        problem = difference(work, device, dtype)
    except Exception as error:  # noqa: BLE001 - a compiler's, a driver's: whatever it is, there is another way
        problem = f"{type(error).__name__}: {error}".splitlines()[0]
    if problem:
        warnings.warn(
            f"the kernel {work.kernel} does not run on {device} as it should ({problem}); plain torch takes its "
            "place, more slowly. Please report this; QLORA_KERNELS=off silences it",
            stacklevel=2,
        )
    return not problem


def difference(work: Pass, device: torch.device, dtype: torch.dtype) -> str | None:
    """What the two forms disagree in on the pass's example; None if nothing."""
    expected, found = work.example(device, dtype), work.example(device, dtype)
    work.plain(*expected)
    work.in_triton(*found)
    for number, (right, ours) in enumerate(zip(expected, found, strict=True)):
        if not isinstance(right, Tensor) or not right.is_floating_point():
            continue
        off = (right.double() - ours.double()).abs().max().item()
        allowed = (
            TOLERANCE[right.dtype if right.dtype in TOLERANCE else dtype] * right.double().abs().max().item()
        )
        if not off <= allowed:  # nan too
            return f"argument {number} is off by {off:.2g}"
    return None


def numbers(device: torch.device, dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    """Normal numbers for an example: the same at every call."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)
