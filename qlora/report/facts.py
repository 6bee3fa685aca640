"""Facts about a run that are known before its first step: one source for header, result.json, facts.json and report.

`RunFacts` holds plain values. Its rows are printed before the first step and shown in report.html; its JSON object is
stored with the run. So the three cannot disagree.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from qlora.recipe.sizes import parameters_text, unit_for

Row = tuple[str, str]
"""label and text; an empty label continues the row above"""


@dataclass(frozen=True)
class DeviceFacts:
    """The device of a run."""

    kind: str
    """cpu or cuda"""
    name: str
    memory_bytes: int
    free_bytes: int
    """when the run started"""
    processes: int
    """number of processes, one for each GPU"""

    def rows(self) -> Iterator[Row]:
        """Yield the rows about the device."""
        unit = unit_for(self.memory_bytes)
        memory = f"{unit.text(self.free_bytes)} of {unit.text(self.memory_bytes)} free"
        several = f"; {self.processes} processes" if self.processes > 1 else ""
        yield "device", f"{self.name}: {memory}{several}"


@dataclass(frozen=True)
class BaseFacts:
    """The base model of a run, and the weights that are trained."""

    name: str
    revision: str | None
    init: str
    parameters: int
    precision: str
    """the precision of the weights in words"""
    compute_dtype: str
    kept: str
    """the weights that are not in 4 bits, with their share; empty if the recipe asks for no quantization"""
    method: str
    """the trained parameters in words"""
    trained_parameters: int

    def rows(self) -> Iterator[Row]:
        """Yield the rows about base and trained weights."""
        made = "" if self.init == "pretrained" else f" with {self.init} weights"
        revision = f" at {self.revision}" if self.revision else ""
        yield (
            "base",
            (
                f"{self.name}{revision}{made}: {parameters_text(self.parameters)} parameters, {self.precision}; "
                f"computed in {self.compute_dtype}"
            ),
        )
        if self.kept:
            yield "", self.kept
        share = self.trained_parameters / self.parameters
        yield "trained", f"{self.method}: {self.trained_parameters:,} parameters, {share:.2%} of the base's"


@dataclass(frozen=True)
class DataFacts:
    """The rows of a run."""

    source: str
    format: str
    held_out_source: str | None
    """None if the held-out rows are a part of `source`"""
    max_length: int
    packing: bool
    counts: dict[str, Any]
    """the fields of `qlora.data.Counts`"""
    remarks: list[str]
    """see `qlora.data.remarks`"""
    held_out_sha256: str | None = None
    """of the tokens and labels of the held-out rows: losses are comparable where it is equal; None in an earlier
    version"""

    def rows(self) -> Iterator[Row]:
        """Yield the rows about data, also one for each kind of content that is left out."""
        counts = self.counts
        and_held_out = f" and {self.held_out_source}" if self.held_out_source else ""
        outcomes = (
            f"{counts['read']:,} rows read, {counts['train']:,} trained, {counts['held_out']:,} held out"
        )
        more = f", {counts['split']:,} more examples from rows that give several" if counts["split"] else ""
        yield "data", f"{self.source}{and_held_out} ({self.format}): {outcomes}{more}"
        if len(counts["sources"]) > 1:
            for part in counts["sources"]:
                rows = (
                    f"{part['read']:,} rows read, {part['train']:,} trained, {part['per_epoch']:,} an epoch"
                )
                yield "", f"{part['source']}: {rows}"
        for line in [*left_out(counts, self.max_length), *self.remarks]:
            yield "", line
        share = counts["supervised"] / counts["tokens"]
        packed = "" if not self.packing else f"; packed rows are {counts['packing_efficiency']:.0%} full"
        trained = f"{counts['supervised']:,} of them trained ({share:.0%}){packed}"
        yield "tokens", f"{counts['tokens']:,} in the training rows, {trained}"


@dataclass(frozen=True)
class StepFacts:
    """The optimizer steps of a run."""

    rows_per_step: int
    rows_in_last_step: int
    """rows of the last step of an epoch, which takes those that are left"""
    micro_batch_size: int
    steps_per_epoch: int
    total_steps: int
    resumed_step: int
    """step of the checkpoint that the run continues from; 0 for a new run"""
    length_before: int | None
    """total steps before the run was resumed, if it had another length"""
    optimizer: str
    lr: float
    schedule: str
    warmup_steps: int
    lr_ratio: float = 1.0
    """learning rate of B over that of A, which is `lr`"""

    def rows(self) -> Iterator[Row]:
        """Yield the rows about steps and learning rate."""
        epochs = self.total_steps / self.steps_per_epoch
        parts = f" in micro-batches of {self.micro_batch_size}" * (self.micro_batch_size < self.rows_per_step)
        rows = "row" if self.rows_per_step == 1 else "rows"
        last = (
            f" (the last with {self.rows_in_last_step})"
            if self.rows_in_last_step < self.rows_per_step
            else ""
        )
        unseen = "; some rows are never trained on" if epochs < 1 else ""
        yield (
            "steps",
            (
                f"{self.total_steps:,} of {self.rows_per_step} {rows}{parts}; {self.steps_per_epoch:,} an epoch{last}, "
                f"{epochs:.3g} {'epoch' if epochs == 1 else 'epochs'}{unseen}"
            ),
        )
        if self.resumed_step:
            yield "", f"resuming from step {self.resumed_step:,} of {self.total_steps:,}"
        if self.length_before is not None:
            schedule = "" if self.schedule == "constant" else ", so the learning rate changes its course"
            yield (
                "",
                f"the run had {self.length_before:,} steps before and has {self.total_steps:,} now{schedule}",
            )
        warmup = f", after {self.warmup_steps} steps of warm-up" if self.warmup_steps else ""
        of_b = "" if self.lr_ratio == 1 else f" for A and {self.lr * self.lr_ratio:g} for B"
        yield "learning rate", f"{self.lr:g}{of_b}, {self.schedule}{warmup}; {self.optimizer}"


@dataclass(frozen=True)
class MemoryFacts:
    """The memory forecast of a run."""

    forecast_bytes: int | None
    """peak on the device; None if the architecture cannot be forecast"""
    text: str

    def rows(self) -> Iterator[Row]:
        """Yield the row about memory."""
        yield "memory", self.text


@dataclass(frozen=True)
class SessionFacts:
    """The process that trained, or that continued the training last."""

    began: str
    """date and time, as in ISO 8601"""
    command: str
    versions: dict[str, str]
    hardware: dict[str, Any]
    stages: dict[str, float]
    """seconds of each stage before the first step"""

    def rows(self) -> Iterator[Row]:
        """Yield the rows about time, command, software and hardware, which only the report shows."""
        yield "began", self.began
        yield "command", self.command
        yield "software", ", ".join(f"{name} {version}" for name, version in self.versions.items())
        memory_bytes = self.hardware["memory_bytes"]
        gpus = [
            f"{gpu['name']} ({unit_for(gpu['memory_bytes']).text(gpu['memory_bytes'])})"
            for gpu in self.hardware["gpus"]
        ]
        yield "hardware", ", ".join([
            f"{self.hardware['cpu']} ({self.hardware['cores']} cores)",
            f"{unit_for(memory_bytes).text(memory_bytes)} of memory", *gpus, self.hardware["system"],
        ])  # fmt: skip
        yield "start", ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.stages.items())


@dataclass(frozen=True)
class RunFacts:
    """Everything about a run that is known before its first step."""

    device: DeviceFacts
    base: BaseFacts
    data: DataFacts
    steps: StepFacts
    memory: MemoryFacts
    output: str
    notes: list[str]
    """what else the user must know, for example the plan for a memory budget"""
    session: SessionFacts

    def header(self) -> list[Row]:
        """Return the rows that are printed before the first step."""
        parts = (self.device, self.base, self.data, self.steps, self.memory)
        rows = [row for part in parts for row in part.rows()]
        return [*rows, ("output", self.output), *(("note", note) for note in self.notes)]

    def rows(self) -> list[Row]:
        """Return all rows, for the report."""
        return [*self.header(), *self.session.rows()]

    def as_json(self) -> dict[str, Any]:
        """Return plain values, as stored in facts.json and result.json."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Rebuild the facts from `as_json` values. Raises TypeError or KeyError if a value is missing or unknown."""
        kinds = {
            "device": DeviceFacts, "base": BaseFacts, "data": DataFacts, "steps": StepFacts, "memory": MemoryFacts,
            "session": SessionFacts,
        }  # fmt: skip
        return cls(**{**values, **{name: kind(**values[name]) for name, kind in kinds.items()}})


def left_out(counts: Mapping[str, Any], max_length: int) -> list[str]:
    """Return one sentence for each reason why rows are left out or cut, with the way to keep them."""
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts["reasons"].items())
    sentences = {
        "bad": f"left out, because they cannot be used: {reasons}. `qlora data` shows them",
        "dropped": (
            f"left out: longer than data.max_length={max_length}. Raise it, or set data.too_long; `qlora data` shows "
            "them"
        ),
        "unsupervised": "left out: no token is trained, usually because the prompt alone fills data.max_length",
        "truncated": f"cut at data.max_length={max_length}; the model does not learn to end there",
    }
    return [
        f"{counts[name]:,} {'row' if counts[name] == 1 else 'rows'} {sentence}"
        for name, sentence in sentences.items()
        if counts[name]
    ]
