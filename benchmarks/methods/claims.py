"""Claims of the LoRA documents and of the papers of its kin, each judged by the cells: holds here, or does not.

A claimed difference needs a paired t-test over the seeds with p below 0.05, after Holm's correction over all claimed
differences. A claimed equality is a claim of non-inferiority: the whole confidence interval must lie within a margin. A
claim that a model of this size cannot show is called untestable, with the reason.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.methods.results import BLEU, LOSS, Result
from benchmarks.methods.rows import short
from benchmarks.methods.statistics import LEVEL, Paired, holm

HOLDS, FAILS, OPEN, SIZE, WAITS = (
    "holds here", "does not hold here", "no difference shown", "cannot be tested at this size", "not run yet",
)  # fmt: skip
MARGIN = 0.05
"""share of the reference's fall in loss, or of its BLEU, within which two settings count as equal"""

Tables = Mapping[str, Mapping[str, Result]]
"""results by experiment and label"""


@dataclass(frozen=True)
class Verdict:
    """Judgement of one claim."""

    claim: str
    verdict: str
    evidence: str = ""
    p: float | None = None
    """p of a claimed difference, not corrected"""


def verdicts(tables: Tables, speed: Mapping[str, Any] | None) -> list[Verdict]:
    """Judge every claim, in the order of the documents."""
    judged = [
        *_methods(tables),
        *_rates(tables),
        *_dials(tables),
        *_quantization(tables),
        *_costs(tables, speed),
        *_untestable(),
    ]
    ps = holm({verdict.claim: verdict.p for verdict in judged if verdict.p is not None})
    return [replace(one, verdict=OPEN) if ps.get(one.claim, 0.0) >= LEVEL else one for one in judged]


def differs(
    claim: str,
    first: Result | None,
    second: Result | None,
    hoped: Callable[[float], bool],
    metric: str = LOSS,
) -> Verdict:
    """Judge that `first` minus `second` of a metric has the sign that `hoped` accepts."""
    pair = _pair(first, second, metric)
    if pair is None:
        return Verdict(claim, WAITS)
    return Verdict(
        claim, HOLDS if hoped(pair.difference.mean) else FAILS, _evidence(first, second, pair, metric), pair.p
    )


def equals(claim: str, first: Result | None, second: Result | None, metric: str = LOSS) -> Verdict:
    """Judge that `first` is not worse than `second` by more than the margin."""
    pair = _pair(first, second, metric)
    if pair is None or second is None or pair.difference.half is None:
        return Verdict(claim, WAITS)
    gained = sum(second.values(metric).values()) / len(second.records)
    sign = -1.0  # more BLEU is better
    if metric == LOSS:
        gained, sign = sum(second.values("loss_before").values()) / len(second.records) - gained, 1.0
    worst, best = (sign * pair.difference.mean + side * pair.difference.half for side in (1, -1))
    margin = MARGIN * gained
    verdict = HOLDS if worst <= margin else FAILS if best > 0 else OPEN
    return Verdict(
        claim,
        verdict,
        f"{_evidence(first, second, pair, metric)}; margin {margin:.{2 if metric == LOSS else 1}f}",
    )


def _pair(first: Result | None, second: Result | None, metric: str) -> Paired | None:
    """Return the paired difference, or None with fewer than three common seeds."""
    pair = None if first is None or second is None else first.against(second, metric)
    return None if pair is None or pair.p is None else pair


def _evidence(first: Result | None, second: Result | None, pair: Paired, metric: str) -> str:
    assert first is not None
    assert second is not None
    return f"{first.label} minus {second.label}: {shown(pair, metric)}"


def shown(pair: Paired, metric: str) -> str:
    """Return a paired difference in words."""
    digits, unit = (1, "BLEU") if metric == BLEU else (4, "nats")
    half = "" if pair.difference.half is None else f" ± {pair.difference.half:.{digits}f}"
    p = "" if pair.p is None else f", p = {pair.p:.2g}"
    return f"{pair.difference.mean:+.{digits}f}{half} {unit}{p}"


def positive(difference: float) -> bool:
    """Return True above zero."""
    return difference > 0


def negative(difference: float) -> bool:
    """Return True below zero."""
    return difference < 0


def _methods(tables: Tables) -> Iterator[Verdict]:
    table = tables["methods"]
    lora, full = table.get("LoRA, 16-bit base"), table.get("full fine-tuning")
    yield equals("LoRA reaches full fine-tuning: E2E NLG, 69.1 BLEU against 68.2 [D3]", lora, full, BLEU)
    yield equals("LoRA reaches full fine-tuning, in held-out loss", lora, full)
    yield differs("BitFit is below LoRA: 65.2% against 68.4% [D3]", table.get("BitFit"), lora, positive)
    layers, prefix = table.get("adapter layers"), table.get("prefix tuning")
    yield differs("adapter layers are below LoRA: 66.7% against 68.4% [D3]", layers, lora, positive)
    yield differs("prefix tuning is below LoRA (LoRA, table 3)", prefix, lora, positive)
    better = {
        "DoRA": "arXiv:2402.09353", "AdaLoRA": "arXiv:2303.10512", "LoRA+": "arXiv:2402.12354",
        "PiSSA": "arXiv:2404.02948",
    }  # fmt: skip
    for label, paper in better.items():
        yield differs(
            f"{label} is better than LoRA at the same rank ({paper})", table.get(label), lora, negative
        )
    yield equals("VeRA is as good as LoRA (arXiv:2310.11454)", table.get("VeRA"), lora)
    qlora, loftq = table.get("QLoRA, NF4 base"), table.get("LoftQ, NF4 base")
    yield differs("LoftQ is better than QLoRA (arXiv:2310.08659)", loftq, qlora, negative)


def _rates(tables: Tables) -> Iterator[Verdict]:
    claim = "LoRA needs about ten times the learning rate of full fine-tuning [D3]"
    best = {name: _lowest(tables[f"lr-{name}"]) for name in ("lora", "full")}
    if best["lora"] is None or best["full"] is None:
        yield Verdict(claim, WAITS)
        return
    lora, full = (float(best[name].lr or 0) for name in ("lora", "full"))  # type: ignore[union-attr]
    ratio = lora / full
    text = f"best of grids in steps of two: LoRA {short(lora)}, full {short(full)}, ratio {ratio:g}"
    yield Verdict(claim, HOLDS if 5 <= ratio <= 20 else FAILS, text)


def _lowest(table: Mapping[str, Result]) -> Result | None:
    """Return the label of a grid with the lowest mean loss; those with more seeds go before the screened."""
    replicated = [result for result in table.values() if not result.screened_only]
    if not replicated:
        return None
    return min(replicated, key=lambda result: result.interval(LOSS).mean)  # type: ignore[union-attr]


def _dials(tables: Tables) -> Iterator[Verdict]:
    one, eight, most = (tables["rank"].get(f"r = {rank}") for rank in (1, 8, 64))
    yield equals("r = 1 often works [D3]: as good as r = 8", one, eight)
    yield equals("r = 8 is typically sufficient [D3]: as good as r = 64", eight, most)
    alpha, half, twice = (tables["alpha"].get(f"alpha = {name}") for name in ("r", "r/2", "2r"))
    yield differs("alpha = r/2 is weaker than r [D3]", half, alpha, positive)
    yield differs("alpha = 2r is stronger than r [D3]", twice, alpha, negative)
    high, root = (tables["high-rank"].get(label) for label in ("alpha/rank", "alpha/sqrt(rank)"))
    yield differs(
        "rsLoRA is better at r = 64 with alpha and rate of r = 8 (arXiv:2312.03732)", root, high, negative
    )
    targets = {label.partition(",")[0]: result for label, result in tables["targets"].items()}
    every, attention = targets.get("all linears"), targets.get("attention")
    yield equals("q, k, v and o are best practice [D3]: as good as all linears", attention, every)
    yield equals("q and v only are enough [D3]: as good as all linears", targets.get("q and v"), every)
    yield differs(
        "MLP alone is better than attention alone (LoRA Without Regret)",
        targets.get("MLP"),
        attention,
        negative,
    )
    yield equals(
        "Gaussian A is as good as Kaiming [D0-D3]",
        tables["init"].get("gaussian"),
        tables["init"].get("kaiming"),
    )
    yield _batch(tables["batch"])


def _batch(table: Mapping[str, Result]) -> Verdict:
    """Judge whether LoRA loses more than full fine-tuning from the smallest to the largest batch."""
    claim = "LoRA tolerates large batches less than full fine-tuning (LoRA Without Regret)"
    sizes = sorted({int(label.rpartition(" ")[2]) for label in table})
    names = [f"{name}, batch {size}" for name in ("LoRA", "full") for size in (sizes[-1:] + sizes[:1])]
    if len(sizes) < 2 or any(name not in table for name in names):
        return Verdict(claim, WAITS)
    lora_large, lora_small, full_large, full_small = (table[name].values(LOSS) for name in names)
    lora = {seed: lora_large[seed] - lora_small[seed] for seed in lora_large.keys() & lora_small.keys()}
    full = {seed: full_large[seed] - full_small[seed] for seed in full_large.keys() & full_small.keys()}
    if not lora.keys() & full.keys() or (pair := Paired.of(lora, full)).p is None:
        return Verdict(claim, WAITS)
    verdict = HOLDS if pair.difference.mean > 0 else FAILS
    means = [sum(losses.values()) / len(losses) for losses in (lora, full)]
    text = (
        f"from batch {sizes[0]} to {sizes[-1]} LoRA loses {means[0]:.4f} nats and full fine-tuning {means[1]:.4f}: "
        f"{shown(pair, LOSS)}"
    )
    return Verdict(claim, verdict, text, pair.p)


def _quantization(tables: Tables) -> Iterator[Verdict]:
    table = tables["quantization"]
    plain, nf4 = table.get("16-bit"), table.get("NF4")
    yield equals("a fine-tuned NF4 base is as good as a 16-bit base (QLoRA, section 4)", nf4, plain)
    for other in ("FP4, simulated", "int4, simulated"):
        yield _before(
            f"NF4 is better than {other}, before fine-tuning (QLoRA, table 2)", nf4, table.get(other)
        )
        yield differs(f"NF4 is better than {other}, after fine-tuning", nf4, table.get(other), negative)
    double = table.get("NF4, double quantization")
    yield equals("double quantization costs nothing (QLoRA, section 4)", double, nf4)


def _before(claim: str, first: Result | None, second: Result | None) -> Verdict:
    """Judge the losses before fine-tuning, which are the same for all seeds: one base and one set of rows."""
    if first is None or second is None:
        return Verdict(claim, WAITS)
    difference = first.first["loss_before"] - second.first["loss_before"]
    text = f"{difference:+.4f} nats on the same rows; one base, so there is no interval"
    return Verdict(claim, HOLDS if difference < 0 else FAILS, text)


def _costs(tables: Tables, speed: Mapping[str, Any] | None) -> Iterator[Verdict]:
    table = tables["methods"]
    lora, full = table.get("LoRA, 16-bit base"), table.get("full fine-tuning")
    claim = "LoRA needs a third of the memory of full fine-tuning [D3]"
    sizes = [None if result is None else result.interval("memory_bytes") for result in (lora, full)]
    if sizes[0] is None or sizes[1] is None:
        yield Verdict(claim, WAITS)
    else:
        ratio = sizes[0].mean / sizes[1].mean
        text = f"{ratio:.2f} of the peak; activations, which are most of it at this size, shrink less than states"
        yield Verdict(claim, HOLDS if ratio < 0.4 else FAILS, text)
    rows = (speed or {}).get("rows", {})
    needed = ("LoRA, 16-bit base", "full fine-tuning", "adapter layers")
    if any(name not in rows for name in needed):
        for claim in (
            "LoRA trains faster than full fine-tuning: 30% of the time [D3]",
            "merging removes the latency of LoRA [all]",
        ):
            yield Verdict(claim, WAITS)
        return
    middle = {name: {kind: _middle(rates) for kind, rates in rows[name].items() if rates} for name in rows}
    ours, whole, layers = (middle[name] for name in needed)
    share = whole["training"] / ours["training"]
    yield Verdict(
        "LoRA trains in 30% of the time of full fine-tuning [D3]",
        HOLDS if share < 0.4 else FAILS,
        f"{share:.0%} of the time",
    )
    loss = 1 - layers["inference"] / whole["inference"]
    yield Verdict(
        "adapter layers slow inference down by 20% [D3]",
        HOLDS if 0.1 < loss < 0.3 else FAILS,
        f"{loss:.0%} slower",
    )
    loss = 1 - ours["merged"] / whole["inference"]
    yield Verdict(
        "a merged LoRA has no latency [all]", HOLDS if loss < 0.05 else FAILS,
        f"merged: {loss:+.1%} slower than a plain model; not merged: {1 - ours['inference'] / whole['inference']:+.1%}",
    )  # fmt: skip


def _middle(rates: list[float]) -> float:
    return sorted(rates)[len(rates) // 2]


def _untestable() -> Iterator[Verdict]:
    reason = "the base has 3.7M parameters and no general language"
    yield Verdict("GPT-3 175B: LoRA 68.4% against 68.8% of full fine-tuning [D3]", SIZE, reason)
    yield Verdict("RoBERTa on GLUE: LoRA 88.0 against 87.8 [D3]", SIZE, reason)
    yield Verdict(
        "LoRA trains 0.01-0.1% of the parameters [D3]",
        SIZE,
        "a share falls with the width; here it is in percent",
    )
    yield Verdict(
        "LLaMA-65B on one GPU of 48 GB [D3]", SIZE, "the forecast answers it: `qlora estimate llama-65b`"
    )
