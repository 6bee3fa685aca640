"""Pictures of the experiments with 95% confidence intervals over the seeds."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.methods.results import BLEU, LOSS, Result
from benchmarks.methods.rows import short
from qlora.report.pictures import ACCENT, LINE, MUTED, SECOND, figure, png

FAINT = "#b9c1ca"
Table = Mapping[str, Result]


def write(tables: Mapping[str, Table], folder: Path) -> list[str]:
    """Draw every picture whose experiments have results; return the names of the files."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn: dict[str, tuple[Callable[..., bytes], list[Table]]] = {
        "methods-quality.png": (quality, [tables["methods"]]),
        "methods-rates.png": (rates, [tables["lr-lora"], tables["lr-full"]]),
        "methods-rank.png": (rank, [tables["rank"]]),
        "methods-dials.png": (dials, [tables["targets"], tables["alpha"], tables["init"]]),
        "methods-batch.png": (batch, [tables["batch"]]),
        "methods-quantization.png": (quantization, [tables["quantization"]]),
    }
    written = []
    for name, (draw, wanted) in drawn.items():
        if all(len(table) > 2 for table in wanted):
            (folder / name).write_bytes(draw(*wanted))
            written.append(name)
    return written


def quality(table: Table) -> bytes:
    """BLEU and held-out loss of every method, the best at the top."""
    trained = {label: result for label, result in table.items() if result.setting.method != "none"}
    ordered = sorted(trained.values(), key=lambda result: -mean(result, LOSS))
    with figure(7, 0.6 + 0.24 * len(ordered)) as drawing:
        left, right = drawing.subplots(1, 2, sharey=True)
        _dots(left, ordered, BLEU, "BLEU (more is better)")
        _dots(right, ordered, LOSS, "held-out loss, nats a token (less is better)")
        drawing.tight_layout()
        return png(drawing)


def rates(lora: Table, full: Table) -> bytes:
    """Held-out loss over the learning rate."""
    with figure(7, 2.8) as drawing:
        axes = drawing.subplots()
        for table, label, colour in (
            (full, "full fine-tuning", SECOND),
            (lora, "LoRA, r = 8, all linears", ACCENT),
        ):
            found = list(table.values())
            screened = [result.screening[LOSS] for result in found]
            axes.plot(
                [result.setting.get("optimizer.lr") for result in found],
                screened,
                color=colour,
                linewidth=1,
                alpha=0.4,
            )
            more = [result for result in found if not result.screened_only]
            _curve(axes, [result.lr for result in more], more, LOSS, colour, label)
        _log(axes, [result.lr for result in (*full.values(), *lora.values())], "learning rate")
        axes.set_title(
            "Held-out loss, nats a token; thin: screening seed, dots: mean of five others", loc="left"
        )
        axes.legend(loc="upper center")
        drawing.tight_layout()
        return png(drawing)


def rank(table: Table) -> bytes:
    """Held-out loss over the rank, and the effective rank of the change."""
    ranks = [result.setting.get("adapter.rank") for result in table.values()]
    with figure(7, 2.8) as drawing:
        left, right = drawing.subplots(1, 2)
        _curve(left, ranks, list(table.values()), LOSS, ACCENT, "")
        _log(left, ranks, "rank")
        left.set_title("Held-out loss, nats a token", loc="left")
        _curve(right, ranks, list(table.values()), "effective_rank", ACCENT, "effective rank")
        _curve(right, ranks, list(table.values()), "rank_90", SECOND, "directions with 90% of the energy")
        right.plot(ranks, ranks, color=FAINT, linewidth=1, linestyle=":", label="rank")
        _log(right, ranks, "rank")
        right.set_yscale("log", base=2)
        right.set_yticks(ranks, [str(rank) for rank in ranks])
        right.set_ylim(top=6 * max(ranks))  # room for the legend
        right.set_title("Rank of what was learned, median layer", loc="left")
        right.legend()
        drawing.tight_layout()
        return png(drawing)


def dials(targets: Table, alpha: Table, init: Table) -> bytes:
    """Held-out loss by target layers, alpha and initialisation."""
    with figure(7, 2.4) as drawing:
        for axes, table, title in zip(
            drawing.subplots(1, 3),
            (targets, alpha, init),
            ("Layers, equal parameters", "Alpha at one learning rate", "Initialisation"),
            strict=True,
        ):
            _dots(axes, list(table.values())[::-1], LOSS, title)
        drawing.tight_layout()
        return png(drawing)


def batch(table: Table) -> bytes:
    """Held-out loss over the batch size at equal tokens."""
    with figure(7, 2.8) as drawing:
        axes = drawing.subplots()
        sizes: list[int] = []
        for name, colour in (("full", SECOND), ("LoRA", ACCENT)):
            found = {
                int(label.rpartition(" ")[2]): result
                for label, result in table.items()
                if label.startswith(name)
            }
            sizes = sorted(found)
            _curve(axes, sizes, [found[size] for size in sizes], LOSS, colour, name)
        _log(axes, sizes, "rows a step, equal rows in all; the best learning rate for each")
        axes.set_title("Held-out loss, nats a token", loc="left")
        axes.legend()
        drawing.tight_layout()
        return png(drawing)


def quantization(table: Table) -> bytes:
    """Held-out loss before and after fine-tuning, next to the 16-bit base."""
    ordered = list(table.values())[::-1]
    with figure(7, 2.6) as drawing:
        left, right = drawing.subplots(1, 2, sharey=True)
        _dots(left, ordered, "loss_before", "before fine-tuning, nats a token")
        _dots(right, ordered, LOSS, "after fine-tuning, nats a token")
        drawing.tight_layout()
        return png(drawing)


def mean(result: Result, metric: str) -> float:
    """Return the mean of a metric, or infinity if no seed has it."""
    interval = result.interval(metric)
    return float("inf") if interval is None else interval.mean


def _dots(axes: Any, results: Sequence[Result], metric: str, title: str) -> None:
    """Draw one line a result, the last at the top: every seed as a dot, the mean with its interval."""
    for place, result in enumerate(results):
        values = list(result.values(metric).values())
        interval = result.interval(metric)
        if interval is None:
            continue
        axes.plot(values, [place] * len(values), "o", color=FAINT, markersize=3, zorder=2)
        axes.errorbar(
            interval.mean, place, xerr=interval.half, fmt="o", color=ACCENT, markersize=4, elinewidth=1.5, zorder=3,
            fillstyle="none" if result.screened_only else "full",
        )  # fmt: skip
    axes.set_yticks(range(len(results)), [result.label for result in results])
    axes.set_ylim(-0.6, len(results) - 0.4)
    axes.set_title(title, loc="left")
    axes.margins(x=0.06)
    axes.grid(axis="both", color=LINE)
    axes.set_axisbelow(True)


def _curve(
    axes: Any, places: Sequence[Any], results: Sequence[Result], metric: str, colour: str, label: str
) -> None:
    found = [(place, result.interval(metric)) for place, result in zip(places, results, strict=True)]
    kept = [(place, interval) for place, interval in found if interval is not None]
    axes.errorbar(
        [place for place, _ in kept], [interval.mean for _, interval in kept],
        yerr=[interval.half or 0.0 for _, interval in kept],
        fmt="o-", color=colour, markersize=4, linewidth=1.2, elinewidth=1.5, label=label,
    )  # fmt: skip


def _log(axes: Any, values: Sequence[Any], name: str) -> None:
    """Give the x axis a logarithmic scale with a tick at every value."""
    ticks = sorted(set(values))
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [short(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(name, color=MUTED)
    axes.margins(x=0.05, y=0.1)
    axes.grid(axis="y")
