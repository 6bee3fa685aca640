"""Curves of a run: drawn by matplotlib for the page, and as data for the script that reads out a point."""

import math
import re
from dataclasses import dataclass
from typing import Any

from qlora.report import pictures
from qlora.report.history import History
from qlora.report.pictures import ACCENT, SECOND

INCHES = (4.6, 2.7)
"""size of a chart: narrow enough for text that is readable on a phone"""

LEFT, BOTTOM, RIGHT, TOP = 0.115, 0.11, 0.955, 0.88
"""edges of the plot in its chart, as fractions from the lower left; the page lays the cursor over the plot"""

POINTS = 400
"""most points of a curve; a longer curve keeps the lowest and the highest point of each stretch"""

HEADROOM = 0.05
"""least distance of a curve from the edges of its plot, as a share of the values' range"""

MARKS: dict[str, dict[str, Any]] = {
    "line": {"color": ACCENT, "linewidth": 1.3},
    "faint": {"color": ACCENT, "linewidth": 0.6, "alpha": 0.45},
    "dots": {"color": SECOND, "linewidth": 1.3, "marker": "o", "markersize": 4},
}
"""a line, a noisy line behind another line, and joined dots"""

Point = tuple[int, float]
"""(step, value)"""


@dataclass(frozen=True)
class Series:
    """One curve."""

    name: str
    points: list[Point]
    mark: str = "line"
    """key of MARKS"""

    @property
    def finite(self) -> list[Point]:
        """The points that can be drawn."""
        return [point for point in self.points if math.isfinite(point[1])]


@dataclass(frozen=True)
class Chart:
    """Curves over the same steps, with the same unit."""

    title: str
    unit: str
    series: list[Series]
    last_step: int
    style: str = "number"
    """format of the numbers: number, count (1,234) or power (1.00e-4)"""

    @property
    def svg(self) -> str:
        """The chart as an SVG element. A value that is not finite interrupts its curve.

        The scale begins at zero, unless the values differ little. A constant curve is in the middle of the plot.
        """
        with pictures.figure(*INCHES) as figure:
            axes = figure.add_axes((LEFT, BOTTOM, RIGHT - LEFT, TOP - BOTTOM))
            axes.locator_params(nbins=5)
            axes.locator_params("x", integer=True)
            axes.xaxis.set_major_formatter("{x:,.0f}")
            if self.style == "count":
                axes.yaxis.set_major_formatter("{x:,.0f}")
            for series in self.series:
                mark = MARKS[series.mark]
                axes.plot(*zip(*series.points, strict=True), label=series.name, clip_on=False, **mark)
            values = [value for series in self.series for _, value in series.finite]
            low, high = min(values, default=0.0), max(values, default=1.0)
            if low == high:
                axes.update_datalim([(0, 0), (0, 2 * high)] if high else [(0, -1), (0, 1)])
            else:
                zero_based = 0 <= low <= 0.6 * high
                room = HEADROOM * (high - (0 if zero_based else low))
                axes.update_datalim([(0, 0 if zero_based else low - room), (0, high + room)])
            axes.set_xlim(0, self.last_step)
            axes.grid(axis="y")
            if len(self.series) > 1:
                axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(self.series), borderaxespad=0)
            return pictures.svg_element(figure, re.sub(r"[^a-z0-9]+", "-", self.title.lower()))

    @property
    def description(self) -> str:
        """The chart in words, for screen readers."""
        ends = [
            f"{series.name} from {series.finite[0][1]:.4g} to {series.finite[-1][1]:.4g}"
            for series in self.series
            if series.finite
        ]
        return f"{self.title} by step: {', '.join(ends)}"

    @property
    def data(self) -> dict[str, Any]:
        """The chart as JSON for the page's script. Values that are not finite are null: JSON has no NaN."""
        return {
            "last": self.last_step,
            "style": self.style,
            "series": [
                {
                    "name": series.name,
                    "points": [[x, y if math.isfinite(y) else None] for x, y in series.points],
                }
                for series in self.series
            ],
        }


def charts(history: History) -> list[Chart]:
    """Return the charts of losses, metrics, learning rate, gradient norm and speed; none before the first step."""
    last = history.last_step
    if not history.steps:
        return []
    aux = [(step["step"], float(step["aux_loss"])) for step in history.steps if "aux_loss" in step]
    balance = (
        [Chart("Auxiliary loss", "without its coefficient", _with_mean("aux_loss", aux), last)] if aux else []
    )
    metrics = [
        Chart(name, "of held-out rows", [Series(name, thinned(points), "dots")], last)
        for name, points in history.metrics.items()
    ]
    return [
        loss_chart(history),
        *balance,
        *metrics,
        Chart("Learning rate", "", [Series("learning rate", thinned(_curve(history, "lr")))], last, "power"),
        Chart("Gradient norm", "before clipping", _with_mean("norm", _curve(history, "grad_norm")), last),
        Chart(
            "Speed",
            "tokens a second",
            _with_mean("tokens/s", _curve(history, "tokens_per_second")),
            last,
            "count",
        ),
    ]


def loss_chart(history: History) -> Chart:
    """Return the chart of the training loss and the held-out loss; of the held-out loss alone before the first step."""
    losses = _with_mean("training loss", _curve(history, "loss")) if history.steps else []
    if history.held_out_losses:
        losses.append(Series("held-out loss", thinned(history.held_out_losses), "dots"))
    return Chart("Loss", "nats a token", losses, history.last_step)


def _curve(history: History, key: str) -> list[Point]:
    return [(step["step"], float(step[key])) for step in history.steps]


def _with_mean(name: str, points: list[Point]) -> list[Series]:
    """Return a curve and, for a long run, its trailing mean over 1% of the run, because single steps are noisy."""
    kept, window = thinned(points), len(points) // 100
    if window < 2:
        return [Series(name, kept)]
    return [Series(name, kept, "faint"), Series(f"mean of {window}", trailing_means(points, kept, window))]


def trailing_means(points: list[Point], at: list[Point], window: int) -> list[Point]:
    """Return a point for each of `at`: the mean of the finite values of the last `window` points up to it."""
    position = {step: i for i, (step, _) in enumerate(points)}
    means = []
    for step, _ in at:
        end = position[step] + 1
        values = [value for _, value in points[max(0, end - window) : end] if math.isfinite(value)]
        means.append((step, sum(values) / len(values) if values else math.nan))
    return means


def thinned(points: list[Point]) -> list[Point]:
    """Reduce to at most POINTS points; keep the last, those that are not finite and the extremes of each stretch."""
    if len(points) <= POINTS:
        return points
    stretch = math.ceil(2 * len(points) / (POINTS - 1))
    kept: set[Point] = {points[-1]}
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        kept |= {min(part, key=_value), max(part, key=_value)}
    return sorted(kept)


def _value(point: Point) -> float:
    """Return the value for a comparison; one that is not finite is the lowest, so that it is kept."""
    return point[1] if math.isfinite(point[1]) else -math.inf
