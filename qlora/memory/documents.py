"""The memory estimates of the LoRA documents, as written, and how far they are from what a run takes.

Their arithmetic counts 2 bytes a weight, 2 a gradient and 4 for Adam's two moments of every trained parameter,
and 2 bytes a frozen weight. For 175B parameters and rank 8: full fine-tuning 350 + 350 + 700 GB, about 1.4 TB;
LoRA 350 GB and next to nothing beside it, "4 times smaller". (Their 0.035 GB for the adapter are 17.5M
parameters of 2 bytes, not the 10M printed beside it.) Activations, logits, the working set of a layer,
dequantization, fp32 copies, allocator slack and the CUDA context are not counted; `remarks` says what that comes to.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qlora.memory.parts import PARTS
from qlora.recipe.sizes import three_digits, unit_for

Method = Literal["lora", "full"]

WEIGHT_BYTES = 2
GRADIENT_BYTES = 2
MOMENTS_BYTES = 4
"""of Adam's two moments together, a trained parameter"""

BASE = ("base_nf4", "quantization_statistics", "base_unquantized")
OPTIMIZER = ("optimizer_state", "optimizer_state_paged")
NOT_COUNTED = (
    "saved_activations", "working_set", "logits_and_loss", "dequantization", "allocator_slack", "device_context",
)  # fmt: skip


def full(parameters: int) -> dict[str, int]:
    """Bytes by part of full fine-tuning: every weight is trained.

    >>> sum(full(175 * 10**9).values()) / 1e12
    1.4
    """
    return {
        "adapters": WEIGHT_BYTES * parameters,
        "gradients": GRADIENT_BYTES * parameters,
        "optimizer_state": MOMENTS_BYTES * parameters,
    }


def lora(parameters: int, adapter_parameters: int) -> dict[str, int]:
    """Bytes by part of LoRA: a frozen base of `parameters` weights in 16 bits and a trained adapter.

    >>> sum(lora(175 * 10**9, 17_500_000).values()) / 1e9
    350.14
    """
    return {"base_unquantized": WEIGHT_BYTES * parameters, **full(adapter_parameters)}


def as_json(
    method: Method,
    parameters: int,
    adapter_parameters: int,
    forecast: Mapping[str, Any],
    measured: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The `documents` object of memory.json, judged against the measurement, or else against the forecast.

    Args:
        method: what the recipe trains.
        parameters: weights of the base.
        adapter_parameters: parameters of the adapter; 0 where there is none.
        forecast: memory.json's `forecast`: `total_bytes` and `parts`.
        measured: memory.json's `measured`.
    """
    both = {
        "full": _estimate(full(parameters)),
        "lora": _estimate(lora(parameters, adapter_parameters)),
    }
    sentences = remarks(method, parameters, adapter_parameters, forecast, measured)
    return {"method": method, **both[method], **both, "remarks": sentences}


def remarks(
    method: Method,
    parameters: int,
    adapter_parameters: int,
    forecast: Mapping[str, Any],
    measured: Mapping[str, Any] | None = None,
) -> list[str]:
    """Sentences that judge the estimate for `method`; only those that hold for the numbers at hand.

    The arguments are those of `as_json`.
    """
    found, name = (forecast, "forecast") if measured is None else (measured, "measured peak")
    if method == "full":
        return list(_Judgement(full(parameters), found, name, parameters).of_full())
    estimate = lora(parameters, adapter_parameters)
    judgement = _Judgement(estimate, found, name, adapter_parameters)
    return [*judgement.of_lora(), *judgement.of_ratios(parameters)]


@dataclass(frozen=True)
class _Judgement:
    """An estimate's parts beside what was found: `total_bytes` and `parts` of a forecast or a measurement."""

    estimate: Mapping[str, int]
    found: Mapping[str, Any]
    name: str
    """of what was found"""
    trained_parameters: int

    def of_full(self) -> Iterator[str]:
        yield self._total("full fine-tuning")
        yield from self._left_out()
        yield from self._trained()

    def of_lora(self) -> Iterator[str]:
        yield self._total("LoRA")
        yield from self._left_out()
        yield from self._base()
        yield from self._trained()

    def of_ratios(self, parameters: int) -> Iterator[str]:
        """What becomes of "4 times less memory" and "10,000 times fewer parameters" here."""
        whole, frozen, actual = sum(full(parameters).values()), self._estimated, self.found["total_bytes"]
        factor, side = (whole / actual, "below") if whole >= actual else (actual / whole, "above")
        yield (
            f"By the documents' arithmetic LoRA takes {whole / frozen:.1f} times less than full fine-tuning "
            f"(they say 4, and 3 elsewhere); the {self.name} is {factor:.1f} times {side} their full fine-tuning."
        )
        if 0 < self.trained_parameters < parameters:
            share = self.trained_parameters / parameters
            yield (
                f"The adapter has {1 / share:,.0f} times fewer parameters than the base, {three_digits(100 * share)}% "
                "of it (their examples: 10,000 times at 175B, 0.094% at 7B)."
            )

    def _total(self, kind: str) -> str:
        actual = self.found["total_bytes"]
        percent = 100 * (self._estimated - actual) / actual
        verdict = f"{abs(percent):,.0f}% too {'high' if percent > 0 else 'low'}"
        if abs(percent) < 1:
            verdict = "right to within 1%"
        return (
            f"The documents' estimate for {kind} is {self._text(self._estimated)}, the {self.name} "
            f"{self._text(actual)}: {verdict}."
        )

    def _left_out(self) -> Iterator[str]:
        missing = {part: size for part in NOT_COUNTED if (size := self._held(part))}
        if missing:
            largest_first = sorted(missing, key=lambda part: -missing[part])
            listed = ", ".join(f"{PARTS[part]} {self._text(missing[part])}" for part in largest_first)
            yield f"It leaves out {self._text(sum(missing.values()))} of the {self.name}: {listed}."

    def _base(self) -> Iterator[str]:
        """The frozen weights: 16 bits by the documents, fewer in NF4."""
        counted, held = self.estimate["base_unquantized"], self._held(*BASE)
        if _differ(counted, held):
            in_nf4 = "NF4 with its statistics and what is not quantized take"
            change = f"{abs(1 - held / counted):.0%} {'less' if held < counted else 'more'}"
            yield (
                f"It counts 2 bytes for every frozen weight, {self._text(counted)}; "
                f"{in_nf4 if self._held('base_nf4') else 'the base takes'} {self._text(held)}, {change}."
            )

    def _trained(self) -> Iterator[str]:
        """The trained parameters, their gradients and the optimizer's state: 2, 2 and 4 bytes by the documents."""
        for part, what in {"adapters": "of a trained parameter", "gradients": "of its gradient"}.items():
            counted, held = self.estimate[part], self._held(part)
            if _differ(counted, held):
                yield (
                    f"It counts 2 bytes {what}, {self._text(counted)}; the {self.name} holds "
                    f"{held / self.trained_parameters:.1f} bytes each, {self._text(held)}."
                )
        counted, held = self.estimate["optimizer_state"], self._held(*OPTIMIZER)
        paged = self._held("optimizer_state_paged")
        some = self._text(paged) if paged < held else "all"
        if _differ(counted, held):
            yield (
                "It counts 4 bytes a trained parameter for Adam's two moments, in 16 bits and with no fp32 master "
                f"copy, {self._text(counted)}; here the optimizer keeps {held / self.trained_parameters:.1f} bytes "
                f"each, {self._text(held)}" + (f", of which {some} may be paged out." if paged else ".")
            )

    @property
    def _estimated(self) -> int:
        return sum(self.estimate.values())

    def _held(self, *parts: str) -> int:
        return sum(self.found["parts"].get(part, 0) for part in parts)

    def _text(self, size_bytes: int) -> str:
        return unit_for(self.found["total_bytes"]).text(size_bytes)


def _differ(estimate: int, actual: int) -> bool:
    """By more than 1%, below which a sentence would say nothing."""
    return estimate > 0 and abs(estimate - actual) > 0.01 * max(estimate, actual)


def _estimate(parts: dict[str, int]) -> dict[str, Any]:
    return {"total_bytes": sum(parts.values()), "parts": parts}
