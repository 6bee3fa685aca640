"""Memory by the rule of thumb of the LoRA documents (Hu et al. 2021 and its summaries), and remarks on its errors.

The rule counts 2 bytes for a weight, and for each trained parameter 2 bytes of gradient and 4 for Adam's two
moments. With 175B parameters and rank 8, full fine-tuning takes 350 + 350 + 700 GB, about 1.4 TB. LoRA takes
350 GB and little more, "4 times smaller". (The 0.035 GB that the documents give for the adapter are 17.5M parameters
of 2 bytes, not the 10M printed next to it.) The rule leaves out activations, logits, a layer's working set,
dequantized weights, fp32 copies, the allocator's slack and the CUDA context. `remarks` puts sizes to all of them.
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
"""Adam's two moments together, for each trained parameter"""

BASE = ("base_nf4", "quantization_statistics", "base_unquantized")
OPTIMIZER = ("optimizer_state", "optimizer_state_paged")
NOT_COUNTED = (
    "saved_activations", "working_set", "logits_and_loss", "dequantization", "allocator_slack", "device_context",
)  # fmt: skip


def full(parameters: int) -> dict[str, int]:
    """Return the bytes of full fine-tuning by part: every weight is trained.

    >>> sum(full(175 * 10**9).values()) / 1e12
    1.4
    """
    return {
        "adapters": WEIGHT_BYTES * parameters,
        "gradients": GRADIENT_BYTES * parameters,
        "optimizer_state": MOMENTS_BYTES * parameters,
    }


def lora(parameters: int, adapter_parameters: int) -> dict[str, int]:
    """Return the bytes of LoRA by part: a frozen base of `parameters` 16-bit weights and a trained adapter.

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
    """Return the `documents` object of memory.json, with remarks against the measurement, or else the forecast.

    Args:
        method: the recipe's method: LoRA or full fine-tuning.
        parameters: number of weights of the base.
        adapter_parameters: number of parameters of the adapter; 0 if there is none.
        forecast: memory.json's `forecast`: `total_bytes` and `parts`.
        measured: memory.json's `measured`, if the run was measured.
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
    """Return sentences that compare the rule for `method` with this run; sentences with nothing to report are left out.

    The arguments are those of `as_json`.
    """
    actual, name = (forecast, "forecast") if measured is None else (measured, "measured peak")
    if method == "full":
        return list(_Remarks(full(parameters), actual, name, parameters).on_full())
    on = _Remarks(lora(parameters, adapter_parameters), actual, name, adapter_parameters)
    return [*on.on_lora(), *on.on_ratios(parameters)]


@dataclass(frozen=True)
class _Remarks:
    """Sentences about an estimate, compared with a forecast or a measurement."""

    estimate: Mapping[str, int]
    """bytes by part"""
    actual: Mapping[str, Any]
    """`total_bytes` and `parts` of the forecast or measurement"""
    name: str
    """name of `actual` in the sentences"""
    trained_parameters: int

    def on_full(self) -> Iterator[str]:
        yield self._total("full fine-tuning")
        yield from self._left_out()
        yield from self._trained()

    def on_lora(self) -> Iterator[str]:
        yield self._total("LoRA")
        yield from self._left_out()
        yield from self._base()
        yield from self._trained()

    def on_ratios(self, parameters: int) -> Iterator[str]:
        """Compare "4 times less memory" and "10,000 times fewer parameters" with this run."""
        whole, frozen, actual = sum(full(parameters).values()), self._estimated, self.actual["total_bytes"]
        factor, side = (whole / actual, "below") if whole >= actual else (actual / whole, "above")
        yield (
            f"By the rule of thumb LoRA takes {whole / frozen:.1f} times less than full fine-tuning (the documents on "
            f"LoRA state 4, elsewhere 3); the {self.name} is {factor:.1f} times {side} the rule for full fine-tuning."
        )
        if 0 < self.trained_parameters < parameters:
            share = self.trained_parameters / parameters
            yield (
                f"The adapter has {1 / share:,.0f} times fewer parameters than the base, {three_digits(100 * share)}% "
                "of it (examples of the LoRA documents: 10,000 times at 175B, 0.094% at 7B)."
            )

    def _total(self, method: str) -> str:
        actual = self.actual["total_bytes"]
        percent = 100 * (self._estimated - actual) / actual
        verdict = f"{abs(percent):,.0f}% too {'high' if percent > 0 else 'low'}"
        if abs(percent) < 1:
            verdict = "right to within 1%"
        return (
            f"The rule of thumb for {method} gives {self._text(self._estimated)}, the {self.name} "
            f"{self._text(actual)}: {verdict}."
        )

    def _left_out(self) -> Iterator[str]:
        missing = {part: size for part in NOT_COUNTED if (size := self._held(part))}
        if missing:
            largest_first = sorted(missing, key=lambda part: -missing[part])
            listed = ", ".join(f"{PARTS[part]} {self._text(missing[part])}" for part in largest_first)
            yield f"It leaves out {self._text(sum(missing.values()))} of the {self.name}: {listed}."

    def _base(self) -> Iterator[str]:
        """Compare the frozen weights: 16 bits by the rule, fewer in NF4."""
        counted, held = self.estimate["base_unquantized"], self._held(*BASE)
        if _differ(counted, held):
            in_nf4 = "NF4 with its statistics and the weights that are not quantized take"
            change = f"{abs(1 - held / counted):.0%} {'less' if held < counted else 'more'}"
            yield (
                f"It counts 2 bytes for every frozen weight, {self._text(counted)}; "
                f"{in_nf4 if self._held('base_nf4') else 'the base takes'} {self._text(held)}, {change}."
            )

    def _trained(self) -> Iterator[str]:
        """Compare the trained parameters, their gradients and the optimizer state: 2, 2 and 4 bytes by the rule."""
        for part, subject in {"adapters": "for a trained parameter", "gradients": "for its gradient"}.items():
            counted, held = self.estimate[part], self._held(part)
            if _differ(counted, held):
                yield (
                    f"It counts 2 bytes {subject}, {self._text(counted)}; the {self.name} holds "
                    f"{held / self.trained_parameters:.1f} bytes each, {self._text(held)}."
                )
        counted, held = self.estimate["optimizer_state"], self._held(*OPTIMIZER)
        paged = self._held("optimizer_state_paged")
        some = self._text(paged) if paged < held else "all"
        if _differ(counted, held):
            yield (
                "It counts 4 bytes a trained parameter for Adam's two moments, in 16 bits and without an fp32 master "
                f"copy, {self._text(counted)}; here the optimizer keeps {held / self.trained_parameters:.1f} bytes "
                f"each, {self._text(held)}" + (f", of which {some} can be paged out." if paged else ".")
            )

    @property
    def _estimated(self) -> int:
        return sum(self.estimate.values())

    def _held(self, *parts: str) -> int:
        return sum(self.actual["parts"].get(part, 0) for part in parts)

    def _text(self, size_bytes: int) -> str:
        return unit_for(self.actual["total_bytes"]).text(size_bytes)


def _differ(estimate: int, actual: int) -> bool:
    """Return True if the sizes differ by more than 1%; below that, a sentence would have nothing to report."""
    return estimate > 0 and abs(estimate - actual) > 0.01 * max(estimate, actual)


def _estimate(parts: dict[str, int]) -> dict[str, Any]:
    return {"total_bytes": sum(parts.values()), "parts": parts}
