"""Choice between an operation's Triton kernel and its plain torch form, after a check on the device in use."""

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
from qlora.runtime.out_of_memory import is_out_of_memory

Form = Callable[..., None]
Example = Callable[[torch.device, torch.dtype], tuple[Any, ...]]

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Largest error in the check, relative to the largest number; it allows for rounding and the order of sums."""


class FusedOp:
    """An operation in two forms, both of which write into some of their tensor arguments.

    Args:
        plain: the form in torch.
        kernel: name of the launcher in `triton_kernels`.
        example: makes small arguments on which the two forms are compared. Their numbers of rows and columns should
            not be powers of two.
        exact: require the two forms to agree bit for bit.
    """

    def __init__(self, plain: Form, kernel: str, example: Example, *, exact: bool = False) -> None:
        self.plain, self.kernel, self.example, self.exact = plain, kernel, example, exact
        self._trusted: dict[tuple[torch.device, torch.dtype], bool] = {}

    def __call__(self, *arguments: Any) -> None:
        first: Tensor = arguments[0]
        if not on_cuda(first) or first.dtype not in TOLERANCE or not wanted():
            return self.plain(*arguments)
        if is_fake(first):
            return None  # a forecast: the kernel allocates nothing
        place = first.device, first.dtype
        if place not in self._trusted:
            self._trusted[place] = True
            self._judge(place, self._problem(*place))
        if self._trusted[place]:
            try:
                return self.in_triton(*arguments)
            except Exception as error:  # compilation failed for these shapes; nothing is written yet
                if is_out_of_memory(error):
                    raise
                self._judge(place, _text(error))
        return self.plain(*arguments)

    @property
    def in_triton(self) -> Form:
        """The function that launches the kernel. Raises ImportError without Triton."""
        from qlora.kernels import triton_kernels  # imported late: Triton is not available on every platform

        return getattr(triton_kernels, self.kernel)

    def states(self) -> dict[str, str]:
        """Return `runs`, or `fell back` to plain torch, by the device and dtype of every use so far."""
        return {
            f"{device} {str(dtype).removeprefix('torch.')}": "runs" if trusted else "fell back"
            for (device, dtype), trusted in self._trusted.items()
        }

    def difference(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Compare the two forms on the example; return the first difference as text, or None."""
        expected, actual = self.example(device, dtype), self.example(device, dtype)
        self.plain(*expected)
        self.in_triton(*actual)
        for number, (right, ours) in enumerate(zip(expected, actual, strict=True)):
            if not isinstance(right, Tensor) or not right.is_floating_point():
                continue
            error = (right.double() - ours.double()).abs().max().item()
            tolerance = 0.0 if self.exact else TOLERANCE[right.dtype]
            if not error <= tolerance * right.double().abs().max().item():  # also true for nan
                return f"argument {number} has an error of {error:.2g}"
        return None

    def _problem(self, device: torch.device, dtype: torch.dtype) -> str | None:
        try:
            return self.difference(device, dtype)
        except Exception as error:  # any error of the compiler or driver: the plain form remains
            if is_out_of_memory(error):
                raise
            return _text(error)

    def _judge(self, place: tuple[torch.device, torch.dtype], problem: str | None) -> None:
        """If there is a problem, stop using the kernel on this device and dtype, and warn."""
        if problem is None:
            return
        self._trusted[place] = False
        warnings.warn(
            f"the kernel {self.kernel} does not run correctly on {place[0]} ({problem}). Plain torch is used instead, "
            "which is slower. Please report this; set QLORA_KERNELS=off to silence this warning",
            stacklevel=3,
        )


def wanted() -> bool:
    """Return True if kernels are enabled: Triton is installed and QLORA_KERNELS is not `off`."""
    return os.environ.get("QLORA_KERNELS") != "off" and _installed()


@cache
def _installed() -> bool:
    """Return True if Triton is installed, or no GPU is present (then a forecast assumes Triton on the target)."""
    installed = find_spec("triton") is not None or not torch.cuda.is_available()
    if not installed:
        warnings.warn(
            "Triton is not installed. Plain torch is used instead of kernels, which is slower; "
            "install it with `pip install triton`",
            stacklevel=2,
        )
    return installed


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def numbers(device: torch.device, dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    """Make normally distributed numbers for an example, the same at every call."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cpu").to(device, dtype)
