"""The curves of a run as geometry: what a template needs to draw them and a script to name a point.

A plot is a square of SIZE that the page stretches to its own shape, with the axes' numbers beside it in percent: so
text keeps its size on any screen.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from qlora.report.history import History

SIZE = 1000
POINTS = 400
"""at most so many a curve; of more, the lowest and the highest of each stretch are kept"""

Point = tuple[int, float]
"""(step, value)"""


@dataclass(frozen=True)
class Series:
    """One curve. `mark` is how it is drawn: line, faint (a noisy line behind another) or dots (joined)."""

    name: str
    points: list[Point]
    mark: str = "line"


@dataclass(frozen=True)
class Chart:
    """Curves over the same steps and with the same unit."""

    title: str
    unit: str
    series: list[Series]
    last_step: int
    style: str = "number"
    """of the numbers: number, count (1,234) or power (1.0e-04)"""

    @cached_property
    def y_ticks(self) -> list[float]:
        """Round numbers that enclose all values; from zero, unless the values are far from it."""
        values = [value for series in self.series for _, value in series.points if math.isfinite(value)]
        low, high = min(values, default=0.0), max(values, default=1.0)
        return ticks(0.0 if 0 <= low < 0.6 * high else low, high)

    @property
    def x_ticks(self) -> list[int]:
        """Round steps within the run."""
        return [
            int(tick) for tick in ticks(0, self.last_step, 3) if tick <= self.last_step and tick == int(tick)
        ]

    def x(self, step: float) -> float:
        """Where a step stands, 0 to SIZE."""
        return round(SIZE * step / max(self.last_step, 1), 1)

    def y(self, value: float) -> float:
        """Where a value stands, 0 (top) to SIZE."""
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return round(SIZE * (high - value) / (high - low), 1)

    def path(self, series: Series) -> str:
        """The curve as SVG path data, interrupted where a value is not finite."""
        pieces, pen = [], "M"
        for step, value in series.points:
            if not math.isfinite(value):
                pen = "M"
                continue
            pieces.append(f"{pen}{self.x(step):g} {self.y(value):g}")
            pen = "L"
        return "".join(pieces)

    def dots(self, series: Series) -> str:
        """The points as SVG path data: lines of no length, which round caps make into dots."""
        finite = [point for point in series.points if math.isfinite(point[1])]
        return "".join(f"M{self.x(step):g} {self.y(value):g}h0" for step, value in finite)

    def text(self, value: float) -> str:
        """A number of an axis."""
        if self.style == "power" and value and self.y_ticks[-1] < 0.001:
            return f"{value:.1e}"
        return f"{value:,.0f}" if self.style == "count" else f"{value:g}"

    @property
    def data(self) -> dict[str, Any]:
        """For the page's script. JSON has no NaN: null is not finite."""
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
    """Loss with held-out loss, learning rate, gradient norm and speed; none before the first step."""
    steps, last = history.steps, history.last_step
    if not steps:
        return []

    def curve(key: str) -> list[Point]:
        return [(step["step"], float(step[key])) for step in steps]

    losses = _with_mean("loss", curve("loss"))
    if history.held_out_losses:
        losses.append(Series("held-out loss", history.held_out_losses, "dots"))
    return [
        Chart("Loss", "nats a token", losses, last),
        Chart("Learning rate", "", [Series("learning rate", thinned(curve("lr")))], last, "power"),
        Chart("Gradient norm", "before clipping", _with_mean("norm", curve("grad_norm")), last),
        Chart(
            "Speed",
            "tokens a second",
            _with_mean("tokens/s", curve("tokens_per_second")),
            last,
            "count",
        ),
    ]


def _with_mean(name: str, points: list[Point]) -> list[Series]:
    """A curve; of a longer run also its mean over a hundredth of the run, as single steps are noisy."""
    kept, window = thinned(points), len(points) // 100
    if window < 2:
        return [Series(name, kept)]
    return [Series(name, kept, "faint"), Series(f"mean of {window}", trailing_means(points, kept, window))]


def trailing_means(points: list[Point], at: list[Point], window: int) -> list[Point]:
    """The mean of the finite values of `window` points up to each of those in `at`."""
    position = {step: i for i, (step, _) in enumerate(points)}
    means = []
    for step, _ in at:
        end = position[step] + 1
        values = [value for _, value in points[max(0, end - window) : end] if math.isfinite(value)]
        means.append((step, sum(values) / len(values) if values else math.nan))
    return means


def thinned(points: list[Point]) -> list[Point]:
    """At most POINTS points, among them the extremes of every stretch, what is not finite, and the last."""
    if len(points) <= POINTS:
        return points
    stretch = math.ceil(2 * len(points) / (POINTS - 1))
    kept: set[Point] = {points[-1]}
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        kept |= {min(part, key=_value), max(part, key=_value)}
    return sorted(kept)


def _value(point: Point) -> float:
    """What is not finite is the lowest, so that it is kept."""
    return point[1] if math.isfinite(point[1]) else -math.inf


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` + 1 round numbers from at or below `low` to at or above `high`, evenly apart."""
    if high - low <= 1e-9 * abs(low):  # nothing, or too little to be written in twelve digits
        high = low + (abs(low) or 1.0)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= 0.999 * rough)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]
