"""Memory pictures: bars of rule of thumb, forecast and measurement, and memory in the course of a step by part."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from qlora.memory.parts import PARTS
from qlora.report import pictures
from qlora.report.memory_comparison import RULE_OF_THUMB, Comparison
from qlora.report.pictures import INK, MUTED, PAPER

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# From the bottom up: first the parts that stay all through a step, above them the parts that come and go. Each family
# (base, trained, overhead, activations, products) has one hue in steps of lightness, distinct for colour-blind eyes and
# in grey.
COLOURS = {
    "base_nf4": "#2b5a8c", "quantization_statistics": "#6596c4", "base_unquantized": "#a9c9e6",
    "adapters": "#a8480f", "gradients": "#df8033", "optimizer_state": "#f3b56b", "optimizer_state_paged": "#fadfb8",
    "device_context": "#8a929b", "allocator_slack": "#c3c9cf", "saved_activations": "#14756a",
    "working_set": "#59b3a2", "logits_and_loss": "#6f4f9b", "dequantization": "#b59fd3",
}  # fmt: skip

ON_DARK, ON_LIGHT = "#ffffff", "#101418"
"""text on a colour of COLOURS; the same in light and dark pages"""

SVG_INCHES = (4.6, 4.2)
"""as wide as a chart of the page: text stays readable on a phone"""

LABEL_INCHES = 2.2
"""width of the longest part's name and size, at the font size of the labels"""

NAME_INCHES, PHASE_INCHES = 0.06, 0.105
"""width of a character at the same font size: of a part's name in its area, and of a phase's name with its margin"""

TITLE_INCHES = 5
"""in narrower drawings the notes of a title have a line of their own"""

NOTE_COLUMNS = 165
"""characters in a line of the footnote"""

BREAK_AT = 1.6
"""a bar this many times as high as all others is broken"""


def png(memory: Mapping[str, Any]) -> bytes:
    """Return memory.png: bars to the left, a step to the right, the peak above, the footnote below."""
    comparison = Comparison(memory)
    with pictures.figure(13, 6.4) as figure:
        summary = comparison.summary
        figure.text(0.03, 0.94, summary, fontsize=min(15, 1350 / len(summary)), fontweight="bold")
        details, small = f"{comparison.fit}\n{comparison.workload}", min(9, 1500 / len(comparison.workload))
        figure.text(0.03, 0.865, details, fontsize=small, color=MUTED, linespacing=1.5)
        footnote = textwrap.fill(RULE_OF_THUMB, NOTE_COLUMNS)
        figure.text(0.03, 0.02, footnote, color=MUTED, linespacing=1.4)
        left, right = figure.add_axes((0.045, 0.14, 0.44, 0.66)), figure.add_axes((0.55, 0.14, 0.4, 0.66))
        _bars(left, comparison, labels=True)
        _timeline(right, comparison)
        return pictures.png(figure)


def bars_svg(memory: Mapping[str, Any]) -> str:
    """Return the bars as an SVG element that takes its ink and paper from the page's variables.

    The page names the parts next to it, see `legend`.
    """
    with pictures.figure(*SVG_INCHES) as figure:
        _bars(figure.add_axes((0.085, 0.1, 0.9, 0.79)), Comparison(memory), labels=False)
        return pictures.svg_element(figure, "bars")


def timeline_svg(memory: Mapping[str, Any]) -> str:
    """Return memory in the course of a step by part, as an SVG element like `bars_svg`."""
    with pictures.figure(*SVG_INCHES) as figure:
        _timeline(figure.add_axes((0.085, 0.1, 0.815, 0.79)), Comparison(memory))
        return pictures.svg_element(figure, "timeline")


def legend(memory: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (label, colour) of every part in the pictures, in the order of the table."""
    comparison = Comparison(memory)
    columns = [column["parts"] for column in comparison.columns.values() if column]
    in_course = comparison.forecast["timeline"]["parts"]
    return [
        (label, COLOURS[part])
        for part, label in PARTS.items()
        if any(in_course.get(part, ())) or any(column.get(part) for column in columns)
    ]


def _bars(axes: "Axes", comparison: Comparison, *, labels: bool) -> None:
    """Draw a bar for each column; with `labels`, the names of the parts are to the right of the last bar."""
    columns = {name: column for name, column in comparison.columns.items() if column is not None}
    top = _top(comparison)
    for x, column in enumerate(columns.values()):
        _bar(axes, x, column, top, comparison)
    _style(axes, "at the peak", [], len(columns) - 0.6, top, comparison)
    end = len(columns) - 0.5
    if labels:
        _labels(axes, len(columns) - 1, comparison, top)
        room = LABEL_INCHES / (_inches(axes) - LABEL_INCHES)
        end = (1 + room) * (len(columns) + 0.18) - 0.5
    axes.set_xlim(-0.5, end)
    axes.set_xticks(
        range(len(columns)), [name.replace("rule of ", "rule of\n") for name in columns], color=INK
    )


def _inches(axes: "Axes") -> float:
    """Return the width of the plotted area of `axes`, in inches."""
    return axes.bbox.width / axes.figure.dpi


def _top(comparison: Comparison) -> int:
    """Return the end of the scale: above all bars, unless full fine-tuning would dwarf the others."""
    totals = [size for size in comparison.total.sizes if size is not None]
    whole, others = totals[0], max(totals[1:])
    return _with_capacity(comparison, others if whole > BREAK_AT * others else max(totals))


def _with_capacity(comparison: Comparison, top: int) -> int:
    """Return `top`, or the device's memory if the scale need not grow much to show it."""
    capacity = comparison.capacity_bytes
    return max(top, capacity) if capacity is not None and capacity < 1.5 * top else top


def _bar(axes: "Axes", x: int, column: Mapping[str, Any], top: int, comparison: Comparison) -> None:
    """Draw one column, with the sizes of its larger parts inside and its total above.

    A bar that exceeds the scale is broken: to scale below the break, its last part above the break.
    """
    parts = {part: size for part in COLOURS if (size := column["parts"].get(part, 0))}
    total, bottom = column["total_bytes"], 0
    broken = total > top
    cut, end = (top, 1.1 * top) if broken else (math.inf, total)
    for part, size in parts.items():
        ends_bar = broken and part == list(parts)[-1]
        foot, head = (cut, end) if ends_bar else (bottom, min(bottom + size, cut))
        bottom += size
        if head <= foot:
            continue
        axes.bar(x, head - foot, 0.66, foot, color=COLOURS[part], edgecolor=PAPER, linewidth=0.6)
        if head - foot > (0.075 if head == cut else 0.045) * top:  # the break takes some of the room
            place, colour = (x, (foot + head) / 2), _on(COLOURS[part])
            axes.text(*place, comparison.unit.number(size), ha="center", va="center", color=colour)
    if broken:
        wave = np.linspace(x - 0.36, x + 0.36, 60)
        axes.plot(wave, cut + 0.006 * top * np.sin(50 * wave), color=PAPER, linewidth=3.5)
    axes.annotate(
        comparison.unit.number(total), (x, end), (0, 3), textcoords="offset points",
        ha="center", fontsize=9.5, fontweight="bold",
    )  # fmt: skip


def _labels(axes: "Axes", x: int, comparison: Comparison, top: int) -> None:
    """Write the names of the parts next to the last bar, each at its height or as near as there is room."""
    parts, bottom, places = comparison.best["parts"], 0.0, {}
    for part in COLOURS:
        size = parts.get(part, 0)
        if any(column and column["parts"].get(part) for column in comparison.columns.values()):
            places[part] = bottom + size / 2
        bottom += size
    heights = _spread(list(places.values()), 0.052 * top)
    for (part, middle), height in zip(places.items(), heights, strict=True):
        colour, size = COLOURS[part], parts.get(part, 0)
        if size:
            axes.plot([x + 0.34, x + 0.5, x + 0.6], [middle, height, height], color=colour, linewidth=1)
        axes.plot([x + 0.62], [height], "s", markersize=5, color=colour)
        text = f"{PARTS[part]}  {comparison.unit.number(size) if size else '–'}"
        axes.text(x + 0.74, height, text, va="center")


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move sorted heights as little as possible (least squares) until neighbours are at least `gap` apart."""
    # After subtracting i * gap, the heights only have to be in order: neighbours out of order take their common mean.
    groups: list[tuple[float, int]] = []
    for i, height in enumerate(heights):
        mean, count = height - i * gap, 1
        while groups and groups[-1][0] > mean:
            other, others = groups.pop()
            mean, count = (mean * count + other * others) / (count + others), count + others
        groups.append((mean, count))
    ordered = [max(mean, gap / 2) for mean, count in groups for _ in range(count)]
    return [mean + i * gap for i, mean in enumerate(ordered)]


def _timeline(axes: "Axes", comparison: Comparison) -> None:
    """Draw a step from left to right: the forecast as areas, the measurement as a line."""
    timeline = comparison.forecast["timeline"]
    parts = {
        part: np.array(timeline["parts"][part]) for part in COLOURS if any(timeline["parts"].get(part, ()))
    }
    layers = np.cumsum([*parts.values()], axis=0)  # [parts, samples]: upper edges
    samples = layers.shape[1]
    measured = (comparison.measured or {}).get("timeline")
    top = _with_capacity(comparison, max([*layers[-1].tolist(), *_totals(measured)]))
    lower = np.zeros(samples)
    for part, upper in zip(parts, layers, strict=True):
        axes.fill_between(range(samples), lower, upper, color=COLOURS[part], linewidth=0)
        if not np.ptp(upper):  # lines between parts that come and go would hide the areas
            axes.plot(upper, color=PAPER, linewidth=0.4)
        _name(axes, part, lower, upper, top)
        lower = upper
    if measured:
        _measured_line(axes, measured, timeline)
    _phases(axes, timeline, samples, top)
    _peak(axes, layers[-1], comparison)
    notes = ["areas: forecast", "line: measured"] if measured else ["forecast"]
    _style(axes, "in the course of a step", notes, samples - 1, top, comparison)
    axes.set_xlim(0, samples - 1)
    axes.set_xticks([])


def _totals(timeline: Mapping[str, Any] | None) -> list[int]:
    """Return the bytes of each sample over all parts."""
    return [sum(sizes) for sizes in zip(*timeline["parts"].values(), strict=True)] if timeline else []


def _measured_line(axes: "Axes", measured: Mapping[str, Any], forecast: Mapping[str, Any]) -> None:
    """Draw the measured totals, each phase at its place in the forecast; phases that were not forecast are left out."""
    totals, places = _totals(measured), _spans(forecast)
    for phase, (begin, end) in _spans(measured).items():
        if phase in places:
            heights = totals[begin : end + 1]
            axes.plot(np.linspace(*places[phase], len(heights)), heights, color=INK, linewidth=1.1)


def _spans(timeline: Mapping[str, Any]) -> dict[tuple[str, int], tuple[int, int]]:
    """Map (phase, number of earlier phases of that name) to its first and last sample."""
    samples = len(next(iter(timeline["parts"].values())))
    begins = [(0, ""), *timeline["phases"]]
    spans: dict[tuple[str, int], tuple[int, int]] = {}
    for (begin, name), (end, _) in pairwise([*begins, (samples - 1, "")]):
        if end > begin:
            spans[name, sum(other == name for other, _ in spans)] = begin, end
    return spans


def _name(axes: "Axes", part: str, lower: np.ndarray, upper: np.ndarray, top: int) -> None:
    """Write a part's name into its area where it is highest, if there is room."""
    label = PARTS[part]
    width = round((0.1 + NAME_INCHES * len(label)) / _inches(axes) * len(lower))  # [samples]
    if width >= len(lower):
        return
    windows = np.lib.stride_tricks.sliding_window_view
    ceiling, floor = windows(upper, width).min(axis=1), windows(lower, width).max(axis=1)  # [places]
    place = int((ceiling - floor).argmax())
    if ceiling[place] - floor[place] > 0.04 * top:
        at = place + 0.01 * len(lower), (ceiling[place] + floor[place]) / 2
        axes.text(*at, label, va="center", color=_on(COLOURS[part]))


def _phases(axes: "Axes", timeline: Mapping[str, Any], samples: int, top: int) -> None:
    """Write the names of the longer phases on two levels; phases without room are left out."""
    levels: list[list[tuple[float, float]]] = [[], []]
    spans = sorted(_spans(timeline).items(), key=lambda span: span[1][0] - span[1][1])
    for (name, _), (begin, _) in spans:
        end = begin + PHASE_INCHES / _inches(axes) * len(name) * samples
        free = [n for n, taken in enumerate(levels) if all(end <= a or begin >= b for a, b in taken)]
        if not (name and free):
            continue
        levels[free[0]].append((begin, end))
        height = 1.1 + 0.05 * free[0]
        if begin:
            axes.vlines(begin, 0, (height + 0.035) * top, color=INK, linewidth=0.6, linestyle=(0, (1, 2)))
        place = begin + 0.008 * samples, height * top
        paper = {"facecolor": PAPER, "linewidth": 0, "pad": 0.5}
        axes.text(*place, name, color=MUTED, bbox=paper)


def _peak(axes: "Axes", totals: np.ndarray, comparison: Comparison) -> None:
    """Mark the peak of the forecast."""
    at = int(totals.argmax())
    name = "forecast" if comparison.measured else "peak"
    axes.plot([at], [totals[at]], "o", markersize=5, color=PAPER, markeredgecolor=INK)
    near_end = at > 0.8 * len(totals)
    axes.annotate(
        f"{name} {comparison.unit.number(int(totals[at]))}", (at, totals[at]), (-6 if near_end else 6, 3),
        textcoords="offset points", ha="right" if near_end else "left", fontsize=9, fontweight="bold",
    )  # fmt: skip


def _style(axes: "Axes", title: str, notes: list[str], end: float, top: int, comparison: Comparison) -> None:
    """Set the ticks and the title, which both drawings share.

    If the scale reaches the device's memory, a dashed line marks it, up to `end`.
    """
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    unit, capacity = comparison.unit.unit_bytes, comparison.capacity_bytes
    ticks = unit * np.asarray(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(0, top / unit))
    shown = [tick for tick in ticks if tick <= top]
    if capacity is not None and capacity <= top:
        shown = [capacity, *(tick for tick in shown if abs(tick - capacity) > 0.04 * top)]
        axes.hlines(capacity, -0.5, end, color=PAPER, linewidth=2.4)
        axes.hlines(capacity, -0.5, end, color=INK, linewidth=1, linestyle=(0, (5, 3)))
        notes = [*notes, "dashed: the device"]
    axes.set_ylim(0, 1.22 * top)
    axes.set_yticks(shown)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size / unit:.4g}"))
    axes.axhline(0, color=MUTED, linewidth=0.8)
    title = f"{comparison.unit.name} {title}"
    if notes:
        title += f"{' ' if _inches(axes) > TITLE_INCHES else chr(10)}({'; '.join(notes)})"
    axes.set_title(title, loc="left", fontsize=9, color=MUTED, pad=4)


def _on(colour: str) -> str:
    """Return a text colour that contrasts with `colour` (approximate relative luminance of sRGB)."""
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return ON_LIGHT if 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2 > 0.22 else ON_DARK
