"""The contents of memory.json, in the order and the words that all memory reports share."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qlora.memory.parts import PARTS
from qlora.recipe.sizes import Unit, unit_for

COLUMNS = ("rule of thumb: full", "rule of thumb: LoRA", "forecast", "measured")

RULE_OF_THUMB = (
    "The rule of thumb is the arithmetic of the LoRA documents (Hu et al. 2021 and its summaries): 2 bytes a weight, "
    "2 a gradient, 4 for Adam's two moments of each trained parameter; activations, logits, fp32 copies, dequantized "
    "weights and the allocator are left out."
)
"""footnote of every report with these columns"""

RULE_OF_THUMB_IN_SHORT = (
    "Rule of thumb (Hu et al. 2021): 2 bytes a weight, 2 a gradient, 4 for Adam;\n"
    "left out: activations, logits, fp32 copies, dequantized weights, allocator."
)
"""the footnote in two lines of at most 80 columns"""

COUNTERS = {
    "allocated_bytes": "allocated by tensors",
    "reserved_bytes": "reserved by the allocator",
    "driver_bytes": "used by the process (driver)",
    "resident_bytes": "resident on the host",
}
"""key in memory.json -> label: readings of the allocator, the driver and the operating system, not sums of parts"""


@dataclass(frozen=True)
class Row:
    """One line of a table: a label and its sizes."""

    label: str
    sizes: tuple[int | None, ...]
    """bytes for each of COLUMNS, or for the last two; None if unknown"""

    @property
    def error(self) -> str:
        """Forecast minus measurement, in percent of the measurement; empty if one of them is missing."""
        forecast, measured = self.sizes[-2:]
        if forecast is None or not measured:
            return ""
        percent = round(100 * (forecast - measured) / measured, 1)
        return f"{percent:+.1f}%" if percent else "0.0%"

    def cells(self, unit: Unit) -> list[str]:
        """Return the sizes as text: a dash for zero, empty for unknown."""
        return ["" if size is None else unit.number(size) if size else "–" for size in self.sizes]


@dataclass(frozen=True)
class Comparison:
    """The rule of thumb, the forecast and the measurement of one run."""

    memory: Mapping[str, Any]
    """content of memory.json"""

    @property
    def forecast(self) -> Mapping[str, Any]:
        """The forecast."""
        return self.memory["forecast"]

    @property
    def measured(self) -> Mapping[str, Any] | None:
        """The measurement; None if nothing was measured."""
        return self.memory.get("measured")

    @property
    def best(self) -> Mapping[str, Any]:
        """The measurement, or else the forecast."""
        return self.measured or self.forecast

    @property
    def columns(self) -> dict[str, Mapping[str, Any] | None]:
        """`total_bytes` and `parts` of each column."""
        rule = self.memory["documents"]
        columns = (rule["full"], rule["lora"], self.forecast, self.measured)
        return dict(zip(COLUMNS, columns, strict=True))

    @property
    def capacity_bytes(self) -> int | None:
        """Memory of the device; None if unknown."""
        return self.memory["device"]["capacity_bytes"]

    @property
    def unit(self) -> Unit:
        """The unit of all numbers."""
        return unit_for(self.best["total_bytes"])

    @property
    def rows(self) -> list[Row]:
        """A row of the memory table for each category (qlora.memory.parts) that is not zero in all columns."""
        sizes = {
            label: tuple(_size(column, part) for column in self.columns.values())
            for part, label in PARTS.items()
        }
        return [Row(label, row) for label, row in sizes.items() if any(row)]

    @property
    def total(self) -> Row:
        """The totals of the columns."""
        return Row("total", tuple(_size(column) for column in self.columns.values()))

    @property
    def phases(self) -> list[Row]:
        """The peak in each phase of a step, forecast and measured."""
        measured = self.measured["phases"] if self.measured else {}
        return [Row(name, (size, measured.get(name))) for name, size in self.forecast["phases"].items()]

    @property
    def counters(self) -> list[Row]:
        """The known readings of COUNTERS, forecast and measured."""
        rows = [
            Row(label, (self.forecast.get(key), (self.measured or {}).get(key)))
            for key, label in COUNTERS.items()
        ]
        return [row for row in rows if any(row.sizes)]

    @property
    def peak(self) -> str:
        """The peak and its phase: `Peak 7.12 GiB in backward (forecast 7.19, +1.0%)`."""
        peak = f"Peak {self.unit.number(self.best['total_bytes'])} {self.unit.name} in {self.best['peak']}"
        if self.measured is None:
            return f"{peak} (forecast)"
        return f"{peak} (forecast {self.unit.number(self.forecast['total_bytes'])}, {self.total.error})"

    @property
    def summary(self) -> str:
        """The peak and its one or two largest parts."""
        total = self.best["total_bytes"]
        largest = sorted(self.best["parts"].items(), key=lambda item: -item[1])[:2]
        shares = [f"{size / total:.0%} {PARTS[part]}" for part, size in largest if size >= 0.1 * total]
        return ": ".join(filter(None, [self.peak, "; ".join(shares)]))

    @property
    def fit(self) -> str:
        """The device, and the memory that the run leaves free on it."""
        name, capacity = self.memory["device"]["name"], self.capacity_bytes
        if capacity is None:
            return name
        left = capacity - self.best["total_bytes"]
        paged = self.best["parts"].get("optimizer_state_paged", 0)
        verdict = f"{self.unit.text(left)} left" if left >= 0 else f"{self.unit.text(-left)} too little"
        if left < 0 <= left + paged:
            verdict = f"{self.unit.text(-left)} of the optimizer state on the host"
        return f"{name}, {self.unit.text(capacity)}: {verdict}"

    @property
    def workload(self) -> str:
        """The micro-batch, recomputation and loss chunk of the run."""
        work = self.memory["workload"]
        mlps = work.get("checkpointed_mlps")  # older records have none
        return (
            f"micro-batches of {work['micro_batch_size']} × {work['row_tokens']:,} tokens"
            f"{', packed' if work['packing'] else ''}, {work['supervised']:,} supervised ({work['basis']}); "
            f"{work['checkpointed_layers']} of {work['layers']} layers checkpointed"
            f"{f', the MLP alone in {mlps}' if mlps else ''}; "
            f"loss in chunks of {work['loss_chunk']:,} tokens"
        )


def _size(column: Mapping[str, Any] | None, part: str | None = None) -> int | None:
    """Return the total of a column, or one part of it; None if there is no such column."""
    if column is None:
        return None
    return column["total_bytes"] if part is None else column["parts"].get(part, 0)
