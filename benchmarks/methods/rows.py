"""Rows of the comparison table: every method of the package's registry, its variants, and the rivals.

A method of the registry without an entry here gets the settings of LoRA, so a new file in `qlora.adapter.methods` is
compared without a change here. Every row has its own grid of learning rates, because a fair comparison tunes each
method. The low-rank methods have rank 8 on all linear layers, the adapter layers as many parameters.
"""

from dataclasses import dataclass
from typing import Any

from benchmarks.methods.cell import Setting
from benchmarks.methods.training import RIVALS, trains
from qlora.recipe.methods import METHODS

RANK = 8
ALL_LINEAR: dict[str, Any] = {"adapter__targets": "all-linear"}
LOW_RANK: dict[str, Any] = {**ALL_LINEAR, "adapter__rank": RANK}


def doubled(first: float, count: int) -> tuple[float, ...]:
    """Return `count` learning rates from `first` on, each twice the one before."""
    return tuple(first * 2**n for n in range(count))


def short(value: float) -> str:
    """Return a number with at most three digits, small ones as 1.25e-4."""
    if value >= 1:
        return f"{value:g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    label: str
    setting: Setting
    """without a learning rate"""
    lrs: tuple[float, ...]

    @property
    def grid(self) -> list[Setting]:
        """The setting at each learning rate."""
        return [self.setting.but(optimizer__lr=lr) for lr in self.lrs]


LORA_LRS = doubled(1e-3, 5)
NEAR = LORA_LRS[1:4]
LORA = Setting.of("lora", **LOW_RANK)
QLORA = LORA.but(base__quantization="nf4")

TABLE = (
    Row("full fine-tuning", Setting.of("full"), doubled(2.5e-4, 5)),
    Row("LoRA, 16-bit base", LORA, LORA_LRS),
    Row("QLoRA, NF4 base", QLORA, LORA_LRS),
    Row("BitFit", Setting.of("bitfit", **ALL_LINEAR), doubled(4e-3, 4)),
    Row("adapter layers", Setting.of("adapter_layers"), doubled(1e-3, 4)),
    Row("prefix tuning", Setting.of("prefix_tuning"), doubled(1e-2, 4)),
    Row("DoRA", Setting.of("dora", **LOW_RANK), NEAR),
    Row("VeRA", Setting.of("vera", **ALL_LINEAR, adapter__rank=64), doubled(8e-3, 4)),
    Row("AdaLoRA", Setting.of("adalora", **LOW_RANK, adapter__budget__every=4), doubled(2e-3, 4)),
    Row("rsLoRA", LORA.but(adapter__scaling="alpha/sqrt(rank)"), NEAR),
    Row("LoRA+", LORA.but(adapter__lr_ratio=16.0), doubled(2.5e-4, 4)),
    Row("PiSSA", LORA.but(adapter__init="pissa"), doubled(5e-4, 4)),
    Row("LoftQ, NF4 base", QLORA.but(adapter__init="loftq"), NEAR),
)


def unnamed() -> list[Row]:
    """Return a row with LoRA's settings for each method of the registry that has none in `TABLE`."""
    named = {row.setting.method for row in TABLE}
    keys: dict[str, dict[str, Any]] = {
        name: {"adapter__rank": RANK, "adapter__targets": "all-linear"}
        for name in METHODS
        if name not in named
    }
    for name, settings in keys.items():
        for unused in METHODS[name].unused:
            settings.pop(f"adapter__{unused}", None)
    return [Row(name, Setting.of(name, **settings), LORA_LRS) for name, settings in keys.items()]


def rows() -> list[Row]:
    """Return the rows that this version of the package can train."""
    return [row for row in (*TABLE, *unnamed()) if exists(row.setting.method) and trains(row.setting)]


def absent() -> list[str]:
    """Return the labels of the rows that this version of the package cannot train."""
    return [row.label for row in TABLE if not (exists(row.setting.method) and trains(row.setting))]


def exists(method: str) -> bool:
    """Return True if the package or this benchmark has the method."""
    return method in METHODS or method in RIVALS
