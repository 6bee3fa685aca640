"""memory.json in the order and the words in which every report tells it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qlora.memory.parts import PARTS
from qlora.recipe.sizes import Unit, unit_for

COLUMNS = ("documents: full", "documents: LoRA", "forecast", "measured")

BESIDE = {
    "allocated_bytes": "allocated by tensors",
    "reserved_bytes": "reserved by the allocator",
    "driver_bytes": "the process, says the driver",
    "resident_bytes": "resident on the host",
}
"""numbers that are no sum of parts, as the allocator, the driver and the operating system report them"""


@dataclass(frozen=True)
class Row:
    """One line of a table: a label and bytes, None where there is no such number."""

    label: str
    sizes: tuple[int | None, ...]
    """of COLUMNS, or of its last two"""

    @property
    def error(self) -> str:
        """How far the forecast is from the measurement, in percent of it; empty where one is missing."""
        forecast, measured = self.sizes[-2:]
        if forecast is None or not measured:
            return ""
        percent = round(100 * (forecast - measured) / measured, 1)
        return f"{percent:+.1f}%" if percent else "0.0%"

    def cells(self, unit: Unit) -> list[str]:
        """The sizes as text; a dash for nothing, empty for unknown."""
        return ["" if size is None else unit.number(size) if size else "–" for size in self.sizes]


@dataclass(frozen=True)
class Comparison:
    """The documents' estimates, the forecast and the measurement side by side."""

    memory: Mapping[str, Any]
    """memory.json"""

    @property
    def forecast(self) -> Mapping[str, Any]:
        """What was forecast."""
        return self.memory["forecast"]

    @property
    def measured(self) -> Mapping[str, Any] | None:
        """What was measured, if anything was."""
        return self.memory.get("measured")

    @property
    def found(self) -> Mapping[str, Any]:
        """What is known best: the measurement, or else the forecast."""
        return self.measured or self.forecast

    @property
    def columns(self) -> dict[str, Mapping[str, Any] | None]:
        """`total_bytes` and `parts` of each column."""
        documents = self.memory["documents"]
        columns = (documents["full"], documents["lora"], self.forecast, self.measured)
        return dict(zip(COLUMNS, columns, strict=True))

    @property
    def capacity_bytes(self) -> int | None:
        """The device's memory, where it is known."""
        return self.memory["device"]["capacity_bytes"]

    @property
    def unit(self) -> Unit:
        """The unit of all numbers."""
        return unit_for(self.found["total_bytes"])

    @property
    def rows(self) -> list[Row]:
        """A row for every part of which some column has anything."""
        found = {
            label: tuple(_size(column, part) for column in self.columns.values())
            for part, label in PARTS.items()
        }
        return [Row(label, sizes) for label, sizes in found.items() if any(sizes)]

    @property
    def total(self) -> Row:
        """The totals."""
        return Row("total", tuple(_size(column) for column in self.columns.values()))

    @property
    def phases(self) -> list[Row]:
        """The highest total in each phase of a step, forecast and measured."""
        measured = self.measured["phases"] if self.measured else {}
        return [Row(name, (size, measured.get(name))) for name, size in self.forecast["phases"].items()]

    @property
    def beside(self) -> list[Row]:
        """The numbers of BESIDE that are known, forecast and measured."""
        rows = [
            Row(label, (self.forecast.get(key), (self.measured or {}).get(key)))
            for key, label in BESIDE.items()
        ]
        return [row for row in rows if any(row.sizes)]

    @property
    def peak(self) -> str:
        """How high memory stands at its highest, and when: `Peak 7.12 GiB in backward (forecast 7.19, +1.0%)`."""
        peak = f"Peak {self.unit.number(self.found['total_bytes'])} {self.unit.name} in {self.found['peak']}"
        if self.measured is None:
            return f"{peak} (forecast)"
        return f"{peak} (forecast {self.unit.number(self.forecast['total_bytes'])}, {self.total.error})"

    @property
    def finding(self) -> str:
        """The peak and the one or two parts that make most of it."""
        total = self.found["total_bytes"]
        largest = sorted(self.found["parts"].items(), key=lambda item: -item[1])[:2]
        shares = [f"{size / total:.0%} {PARTS[part]}" for part, size in largest if size >= 0.1 * total]
        return ": ".join(filter(None, [self.peak, "; ".join(shares)]))

    @property
    def fit(self) -> str:
        """The device, and what is left of its memory."""
        name, capacity = self.memory["device"]["name"], self.capacity_bytes
        if capacity is None:
            return name
        left = capacity - self.found["total_bytes"]
        paged = self.found["parts"].get("optimizer_state_paged", 0)
        verdict = f"{self.unit.text(left)} left" if left >= 0 else f"{self.unit.text(-left)} too little"
        if left < 0 <= left + paged:
            verdict = f"{self.unit.text(-left)} of the optimizer's state on the host"
        return f"{name}, {self.unit.text(capacity)}: {verdict}"

    @property
    def workload(self) -> str:
        """What was computed: the batch, and how."""
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
    """The total of a column, or one part of it; None where there is no column."""
    if column is None:
        return None
    return column["total_bytes"] if part is None else column["parts"].get(part, 0)
