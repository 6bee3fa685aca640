"""Optimizers by name, and the kernels that apply one update in place."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from qlora.runtime.bnb import create_dynamic_map
from qlora.runtime.bnb import functional as bnb

# The 256 values of bitsandbytes' dynamic data type: signed for the first moment, unsigned for the second. Plain
# numbers, because a tensor made under FakeTensorMode would remain fake
CODES: tuple[list[float], list[float]] = (
    create_dynamic_map(signed=True).tolist(),
    create_dynamic_map(signed=False).tolist(),
)


@dataclass(frozen=True)
class Method:
    """Update rule, width of its states in bits, and whether its states are paged on a GPU."""

    rule: Literal["adam", "lion"]
    bits: Literal[8, 32]
    paged: bool = False

    @property
    def moments(self) -> tuple[int, ...]:
        """Numbers of the moments that the rule keeps: (1, 2) for Adam, (1,) for Lion."""
        return (1, 2) if self.rule == "adam" else (1,)

    def tables(self, device: torch.device) -> dict[str, Tensor]:
        """Return the values of the 8-bit codes, `code1`, `code2` [256] fp32; an empty dict for 32 bits."""
        if self.bits == 32:
            return {}
        return {f"code{i}": torch.tensor(CODES[i - 1], device=device) for i in self.moments}


METHODS: dict[str, Method] = {
    "adamw": Method("adam", 32),
    "adamw_8bit": Method("adam", 8),
    "paged_adamw_32bit": Method("adam", 32, paged=True),
    "paged_adamw_8bit": Method("adam", 8, paged=True),
    "lion": Method("lion", 32),
    "lion_8bit": Method("lion", 8),
    "paged_lion_32bit": Method("lion", 32, paged=True),
    "paged_lion_8bit": Method("lion", 8, paged=True),
}


@dataclass(frozen=True)
class Update:
    """Hyperparameters of one update."""

    lr: float
    step: int
    """number of this update, from 1"""
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    """decoupled from the gradient, also for Lion"""


Kernel = Callable[[Method, Tensor, Tensor, Mapping[str, Tensor], Update], None]
"""Called with (method, value [n] fp32, gradient [n] fp32, states and tables, update); updates value and states"""


def kernel(method: Method, device: torch.device) -> Kernel:
    """Return torch's fused AdamW if it supports the method (it is faster on a CPU), else a bitsandbytes kernel."""
    if method.bits == 8:
        return _bitsandbytes_8bit
    if method.rule == "adam" and (device.type == "cpu" or not method.paged):
        return _torch_adamw
    return _bitsandbytes_32bit


def _torch_adamw(
    method: Method, value: Tensor, gradient: Tensor, states: Mapping[str, Tensor], update: Update
) -> None:
    """Apply AdamW with fp32 states."""
    adamw(
        [value],
        [gradient],
        [states["moment1"]],
        [states["moment2"]],
        [],
        [torch.full((), update.step - 1.0, device=value.device)],  # the kernel adds one
        fused=True,
        amsgrad=False,
        beta1=update.betas[0],
        beta2=update.betas[1],
        lr=update.lr,
        weight_decay=update.weight_decay,
        eps=update.eps,
        maximize=False,
    )


def _bitsandbytes_32bit(
    method: Method, value: Tensor, gradient: Tensor, states: Mapping[str, Tensor], update: Update
) -> None:
    """Apply AdamW or Lion with fp32 states."""
    bnb.optimizer_update_32bit(
        method.rule,
        gradient,
        value,
        states["moment1"],
        update.betas[0],
        update.eps,
        update.step,
        update.lr,
        state2=states.get("moment2"),
        beta2=update.betas[1],
        weight_decay=update.weight_decay,
    )


def _bitsandbytes_8bit(
    method: Method, value: Tensor, gradient: Tensor, states: Mapping[str, Tensor], update: Update
) -> None:
    """Apply AdamW or Lion with 8-bit states and one fp32 scale per block of 256."""
    bnb.optimizer_update_8bit_blockwise(
        method.rule,
        gradient,
        value,
        states["moment1"],
        states.get("moment2"),
        beta1=update.betas[0],
        beta2=update.betas[1],
        beta3=0.0,
        alpha=0.0,
        eps=update.eps,
        step=update.step,
        lr=update.lr,
        qmap1=states["code1"],
        qmap2=states.get("code2"),
        absmax1=states["absmax1"],
        absmax2=states.get("absmax2"),
        weight_decay=update.weight_decay,
    )
