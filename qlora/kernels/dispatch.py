"""Which form of a pass runs: the kernel where it is proven on this very device, else plain torch."""

import os
import warnings
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from qlora.runtime.device import on_cuda
from qlora.runtime.fake import is_fake

Form = Callable[..., None]
Example = Callable[[torch.device, torch.dtype], tuple[Any, ...]]

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Of what a proof compares, relative to the largest number: rounding, and the order of sums."""


class FusedOp:
    """A pass over memory in two forms, which write into (some of) the tensors that they are given.

    plain: in torch. kernel: its name in `triton_kernels`. example: small arguments to compare the two on; their
    number of rows and columns should be no power of two. exact: the two must agree to the bit.
    """

    def __init__(self, plain: Form, kernel: str, example: Example, *, exact: bool = False) -> None:
        self.plain, self.kernel, self.example, self.exact = plain, kernel, example, exact
        self._trusted: dict[tuple[torch.device, torch.dtype], bool] = {}

    def __call__(self, *arguments: Any) -> None:
        first: Tensor = arguments[0]
        if not on_cuda(first) or first.dtype not in TOLERANCE or not wanted():
            return self.plain(*arguments)
        if is_fake(first):
            return None  # a forecast: the kernel takes no memory but its arguments
        place = first.device, first.dtype
        if place not in self._trusted:
            self._trusted[place] = True
            self._judge(place, self._problem(*place))
        if self._trusted[place]:
            try:
                return self.in_triton(*arguments)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # noqa: BLE001 - it cannot be compiled for these shapes; nothing is written yet
                self._judge(place, _text(error))
        return self.plain(*arguments)

    @property
    def in_triton(self) -> Form:
        """The kernel, launched. Raises ImportError where there is no Triton."""
        from qlora.kernels import triton_kernels  # late, for Triton does not exist everywhere

        return getattr(triton_kernels, self.kernel)

    def difference(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """What the two forms disagree in on the example; None if nothing."""
        expected, found = self.example(device, dtype), self.example(device, dtype)
        self.plain(*expected)
        self.in_triton(*found)
        for number, (right, ours) in enumerate(zip(expected, found, strict=True)):
            if not isinstance(right, Tensor) or not right.is_floating_point():
                continue
            off = (right.double() - ours.double()).abs().max().item()
            tolerance = 0.0 if self.exact else TOLERANCE[right.dtype]
            if not off <= tolerance * right.double().abs().max().item():  # nan too
                return f"argument {number} is off by {off:.2g}"
        return None

    def _problem(self, device: torch.device, dtype: torch.dtype) -> str | None:
        try:
            return self.difference(device, dtype)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - a compiler's, a driver's: whatever it is, there is another way
            return _text(error)

    def _judge(self, place: tuple[torch.device, torch.dtype], problem: str | None) -> None:
        """Trust the kernel no longer if there is a problem, and say so."""
        if problem is None:
            return
        self._trusted[place] = False
        warnings.warn(
            f"the kernel {self.kernel} does not run on {place[0]} as it should ({problem}); plain torch takes its "
            "place, more slowly. Please report this; QLORA_KERNELS=off silences it",
            stacklevel=3,
        )


def wanted() -> bool:
    """Whether kernels are to be used: not with QLORA_KERNELS=off in the environment, nor where there is no Triton."""
    return os.environ.get("QLORA_KERNELS") != "off" and _installed()


@cache
def _installed() -> bool:
    """Whether this machine has Triton, or no GPU that could want it: then it is asked about another one."""
    found = find_spec("triton") is not None or not torch.cuda.is_available()
    if not found:
        warnings.warn(
            "Triton is not installed: plain torch takes the place of kernels, more slowly", stacklevel=2
        )
    return found


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def numbers(device: torch.device, dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    """Normal numbers for an example: the same at every call."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cpu").to(device, dtype)
