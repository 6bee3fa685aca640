"""Report of a comparison: Markdown for readers, JSON with every measurement."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.speed.contenders import OURS
from benchmarks.speed.fairness import TOLERANCES, problems, reference
from benchmarks.speed.growth import Point
from benchmarks.speed.prepare import Prepared
from benchmarks.speed.presets import Shape
from benchmarks.speed.ratios import Score, Spread, ratios, scores
from benchmarks.speed.rounds import Comparison

Growth = Sequence[tuple[Point, Comparison]]


def markdown(comparison: Comparison, machine: dict[str, Any], command: str, growth: Growth = ()) -> str:
    """Return the report as Markdown."""
    results = scores(comparison)
    sections = [
        _heading(comparison, machine, command),
        _speed(comparison, results),
        _ratios(results),
        _fairness(comparison),
        _starting(results),
        _setups(comparison),
        _growth(growth),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def record(
    comparison: Comparison, machine: dict[str, Any], command: str, growth: Growth = ()
) -> dict[str, Any]:
    """Return the report as plain data, with every answer of every round."""

    def plain(one: Comparison) -> dict[str, Any]:
        results = scores(one)
        return {
            "setting": dataclasses.asdict(one.setting),
            "prepared": {
                "device": one.prepared.device,
                "dtype": one.prepared.dtype,
                "tokens": one.prepared.tokens,
                "supervised": one.prepared.supervised,
            },
            "warmup": one.warmup,
            "product_rates": one.product_rates,
            "scores": [dataclasses.asdict(score) for score in results],
            "ratios": [dataclasses.asdict(ratio) for ratio in ratios(results)],
            "failed": problems(one.answers, one.prepared.dtype),
            "answers": {
                name: [dataclasses.asdict(answer) for answer in given] for name, given in one.answers.items()
            },
        }

    return {
        "command": command,
        "machine": machine,
        "comparison": plain(comparison),
        "growth": [
            {"axis": point.axis, "value": point.value, "comparison": plain(one)} for point, one in growth
        ],
    }


def write(path: Path, text: str, data: dict[str, Any]) -> None:
    """Write `<path>.md` and `<path>.json`, each atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix, content in ((".md", text), (".json", json.dumps(data, indent=1) + "\n")):
        file = path.with_name(path.name + suffix)
        part = file.with_name(file.name + ".part")
        part.write_text(content)
        part.replace(file)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table: first column aligned left, the others right."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def spread(value: Spread, digits: int = 2, unit: str = "") -> str:
    """Format as `1.52 (1.48–1.55)`: median, minimum and maximum."""
    middle, least, most = (f"{number:,.{digits}f}" for number in (value.middle, value.least, value.most))
    return f"{middle}{unit} ({least}–{most})"


def mebibytes(count: float) -> str:
    """Format bytes as MiB."""
    return f"{count / 2**20:,.0f}"


def _heading(comparison: Comparison, machine: dict[str, Any], command: str) -> str:
    setting, prepared, preset = comparison.setting, comparison.prepared, comparison.setting.preset
    shape = Shape.of(preset.config)
    tokens, supervised = sum(prepared.tokens), sum(prepared.supervised)
    data = (
        f"dense random tokens, {preset.sequences} x {preset.length} per step, all supervised"
        if setting.gsm8k is None
        else f"questions and answers ({Path(setting.gsm8k).name}), {preset.documents} documents per step, "
        f"{preset.micro_batch} per padded micro-batch, packed rows of {preset.length}"
    )
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items() if number)
    rounds = len(comparison.product_rates)
    timed = len(prepared.tokens) - comparison.warmup
    rates = Spread.of([rate / 1e9 for rate in comparison.product_rates])
    lines = [
        f"# Speed of a training step: {machine['machine']}, {machine['date']}",
        "",
        f"- Command: `{command}`",
        f"- Commit: {machine['commit']}",
        f"- Machine: {machine['machine']}, {machine['cores']} cores ({machine['cpu_capability']}), "
        f"{machine['threads']} threads, {machine['memory_gib']} GiB; load average before: {machine['load_average']}"
        + (f"; {machine['gpu_memory_gib']} GiB on the GPU" if "gpu_memory_gib" in machine else ""),
        f"- Versions: Python {machine['python']}, {versions}",
        f"- Model: {preset.name}: {_model(shape)}; NF4, double quantization{_experts_of_peers(prepared, shape)}",
        f"- Work: {data}; {supervised / tokens:.0%} of {tokens / len(prepared.tokens):,.0f} tokens per step "
        "supervised; "
        f"LoRA r={setting.rank}, alpha {setting.alpha:g}, every linear layer{_expert_rank(shape, setting.rank)}, "
        "no dropout, lr 2e-4, clip 1.0",
        f"- Matrix products in **{prepared.dtype}** for all contenders"
        + _why_float32(prepared.dtype, setting.dtype),
        f"- Rounds: {rounds}, each with a fresh process per contender; warm-up steps: {comparison.warmup}; "
        f"timed steps: {timed}",
        f"- Matrix products of these shapes alone: {spread(rates, 0)} GFLOP/s, measured once per round",
    ]
    return "\n".join(lines)


def _model(shape: Shape) -> str:
    inner = f"intermediate {shape.intermediate}"
    if shape.experts:
        inner = f"{shape.experts} experts of intermediate {shape.intermediate} a layer, {shape.active} active"
    return f"hidden {shape.hidden}, {shape.layers} layers, {inner}, vocabulary {shape.vocabulary:,}"


def _experts_of_peers(prepared: Prepared, shape: Shape) -> str:
    """Say that the peers hold the experts of a mixture unquantized."""
    if not shape.experts:
        return ""
    return f"; of qlora with the experts, which bitsandbytes leaves in {prepared.dtype} for the peers"


def _expert_rank(shape: Shape, rank: int) -> str:
    ranks = {linear.rank(rank) for linear in shape.linears() if linear.experts > 1}
    return f" but routers, r={ranks.pop()} on each expert" if ranks else ""


def _why_float32(dtype: str, asked: str) -> str:
    if dtype == "float32" and asked == "auto":
        return ": this machine has no hardware for bfloat16, and emulates it many times slower"
    return ""


def _speed(comparison: Comparison, results: Sequence[Score]) -> str:
    cuda = comparison.prepared.device == "cuda"
    kind = "allocated" if cuda else "resident above imports"
    header = [
        "contender",
        "tokens/s",
        "supervised/s",
        "positions/s",
        "seconds per step",
        "processor seconds",
        f"peak MiB, {kind}",
        "peak of process",
        "share of product rate",
        "with recompute",
    ]
    rows = [
        [
            score.contender.name,
            spread(score.tokens, 0),
            f"{score.supervised:,.0f}",
            f"{score.positions:,.0f}",
            spread(score.seconds),
            spread(Spread.of(score.processor)) if score.processor else "–",
            spread(Spread.of([count / 2**20 for count in score.memory]), 0),
            mebibytes(score.highest_memory),
            f"{score.needed_share:.0%}",
            f"{score.performed_share:.0%}",
        ]
        for score in results
    ]
    lines = [
        "## Speed and memory",
        "",
        table(header, rows),
        "",
        "`+ckpt` recomputes the layers' activations in the backward pass, `+mlp` those of the MLPs; the others keep "
        "them. Each cell is the median (minimum–maximum) over the rounds; seconds are over all timed steps. Processor "
        "seconds of a step, on a CPU, hardly grow with the load of other processes. Tokens "
        "are those of the data; positions include padding. Peak memory is that of the timed steps; the peak of the "
        "process includes loading and compiling. The shares divide the operations that a step needs (with recompute: "
        "performs) per second by the measured rate of matrix products alone.",
    ]
    if cuda:
        lines += ["", _cuda_memory(comparison, results)]
    return "\n".join(lines)


def _cuda_memory(comparison: Comparison, results: Sequence[Score]) -> str:
    rows = []
    for score in results:
        memory = [answer.memory for answer in comparison.answers[score.contender.name]]
        peaks = [max(m[key] for m in memory) for key in ("train_allocated", "train_reserved", "driver")]
        rows.append([score.contender.name, *map(mebibytes, peaks)])
    return table(["contender", "MiB allocated", "reserved", "in use as reported by the driver"], rows)


def _ratios(results: Sequence[Score]) -> str:
    pairs = ratios(results)
    if not pairs:
        return ""
    ours = list(dict.fromkeys(ratio.ours for ratio in pairs))
    peers = list(dict.fromkeys(ratio.peer for ratio in pairs))
    by_pair = {(ratio.ours, ratio.peer): ratio for ratio in pairs}
    lines = [
        "## Ratios",
        "",
        "Tokens per second of qlora divided by the peer's, in paired rounds (above 1: qlora is faster):",
        "",
    ]
    lines.append(table(["peer", *ours], [[p, *(spread(by_pair[o, p].speed) for o in ours)] for p in peers]))
    if all(ratio.processor for ratio in pairs):
        lines += [
            "",
            "Processor time of the peer's step divided by that of qlora (above 1: qlora takes less):",
            "",
        ]
        rows = [[p, *(spread(r.processor) for o in ours if (r := by_pair[o, p]).processor)] for p in peers]
        lines.append(table(["peer", *ours], rows))
    lines += ["", "Peak memory of qlora divided by the peer's (below 1: qlora takes less):", ""]
    lines.append(table(["peer", *ours], [[p, *(spread(by_pair[o, p].memory) for o in ours)] for p in peers]))
    return "\n".join(lines)


def _fairness(comparison: Comparison) -> str:
    dtype = comparison.prepared.dtype
    wrong, right = problems(comparison.answers, dtype), reference(comparison.answers)
    tolerance = TOLERANCES[dtype]
    lines = ["## Did they do the same work?", ""]
    if right.losses:
        lines += [
            f"Relative tolerance around the median of all contenders: loss {tolerance.loss:g} and gradient norm "
            f"{tolerance.grad_norm:g} at every step, change of A and B {tolerance.adapter_change:g}. "
            "The last step repeats the tokens of the first.",
            "",
        ]
    rows = []
    for name, given in comparison.answers.items():
        if given[0].error is None:
            answer = given[0]
            first = [f"{value:.4f}" for value in answer.losses[:3]]
            norms = [f"{value:.4f}" for value in answer.grad_norms[:3]]
            cells = [
                " ".join(first),
                f"{answer.losses[-1]:.4f}",
                " ".join(norms),
                f"{answer.adapter_change:.4f}",
            ]
        else:
            cells = ["–"] * 4
        verdict = "same" if name not in wrong else f"**{_verdict(given)}**: {_one_line(wrong[name])}"
        rows.append([name, *cells, verdict])
    header = [
        "contender",
        "losses of steps 1–3",
        "last loss",
        "gradient norms of steps 1–3",
        "change of A, B",
        "",
    ]
    return "\n".join([*lines, table(header, rows)])


def _verdict(given: Sequence[Any]) -> str:
    return "not installed" if all(answer.missing for answer in given) else "FAILED"


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200].replace("|", "/")


def _starting(results: Sequence[Score]) -> str:
    rows = [
        [
            score.contender.name,
            f"{score.import_seconds:.1f}",
            f"{score.load_seconds:.1f}",
            f"{score.first_step_seconds:.1f}",
            f"{max(0.0, score.first_step_seconds - score.seconds.middle):.1f}",
        ]
        for score in results
    ]
    header = ["contender", "imports, s", "load, s", "first step, s", "first step above a usual one, s"]
    note = (
        "Load: from the checkpoint on disk to a model ready to train. "
        "Only the first round compiles; first step is its maximum over the rounds."
    )
    return "\n".join(["## Starting costs", "", table(header, rows), "", note])


def _setups(comparison: Comparison) -> str:
    lines = ["## Setup of each contender", ""]
    for name, given in comparison.answers.items():
        settings = next((answer.settings for answer in given if answer.settings), None)
        if settings:
            lines.append(f"- {name}: " + ", ".join(f"{key}={value}" for key, value in settings.items()))
    return "\n".join(lines)


def _growth(growth: Growth) -> str:
    """Return one table per axis and quantity: contenders in rows, values of the axis in columns."""
    if not growth:
        return ""
    lines = [
        "## Growth",
        "",
        "One round with one warm-up step: read the trends, do not quote the numbers.",
        "",
    ]
    for axis in dict.fromkeys(point.axis for point, _ in growth):
        along = [
            (point, {s.contender.name: s for s in scores(one)}) for point, one in growth if point.axis == axis
        ]
        names = list(dict.fromkeys(name for _, by_name in along for name in by_name))
        names.sort(key=lambda name: not name.startswith(OURS))
        for title, show in (
            ("tokens/s", lambda score: f"{score.tokens.middle:,.0f}"),
            ("peak MiB", lambda score: mebibytes(score.memory[0])),
            ("share of product rate", lambda score: f"{score.needed_share:.0%}"),
        ):
            rows = [
                [name, *(show(by_name[name]) if name in by_name else "–" for _, by_name in along)]
                for name in names
            ]
            lines += [table([f"{title} over {axis}", *(point.value for point, _ in along)], rows), ""]
    return "\n".join(lines).rstrip()
