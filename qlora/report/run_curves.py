"""Picture of several runs: their held-out losses and their smoothed training losses in one file."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora.errors import UsageError
from qlora.report import pictures
from qlora.report.curves import HEADROOM, Point, thinned, trailing_means
from qlora.report.history import History
from qlora.report.pictures import INK, MUTED
from qlora.report.run_comparison import Compared, RunComparison, shortened
from qlora.storage import atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INCHES = (11, 4.6)

MOST = 10
"""most runs with a colour of their own; the others are grey"""

# Okabe and Ito's colours without yellow, which white paper hides: distinct for colour-blind eyes. From the eighth run
# on, dashes tell the runs with the same colour apart, and so does the marker.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", INK)
MARKERS = "osD^vPX<>*"
GREY = "#b5bbc2"

SMOOTHED = 0.05
"""share of a run's steps in a mean of its training loss"""

LOGARITHMIC = 4
"""ratio of the largest to the smallest loss from which the scale is logarithmic"""


def check_absent(path: Path) -> None:
    """Raise UsageError if a picture cannot be written to `path`: it exists, or its name has another ending."""
    pictures.require_format(path)
    if path.exists() or path.is_symlink():
        raise UsageError(f"{path}: already exists; choose another name, or remove it")


def write(comparison: RunComparison, path: Path) -> None:
    """Write the picture of the runs to a file with the ending .png, .svg or .pdf.

    Raises:
        UsageError: the file exists, or no run has a loss yet.
        SaveError: it cannot be written.
    """
    check_absent(path)
    if not any(run.history.steps or run.history.evaluations for run in comparison.files):
        raise UsageError(f"{path}: not written, because no run has a loss yet")
    atomic.write(path, draw(comparison, path.suffix[1:].lower()))


def draw(comparison: RunComparison, kind: str = "png") -> bytes:
    """Return the picture as a file of this kind: png, svg or pdf."""
    tokens = not comparison.same_steps
    with pictures.figure(*INCHES) as figure:
        figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.08)
        held_out, training = figure.subplots(1, 2)
        coloured = _coloured(comparison.runs)
        grey = len(comparison.runs) - len(coloured)
        for number, (run, files) in enumerate(zip(comparison.runs, comparison.files, strict=True)):
            style, label = _grey(), "_"
            if number in coloured:
                place = coloured.index(number)
                style, label = _style(place), _label(run, comparison)
            elif grey:
                label, grey = f"{grey} others", 0
            _draw(held_out, files.history.held_out_losses, files.history, tokens, label=label, **style)
            _draw(training, _smoothed(files.history), files.history, tokens, **{**style, "marker": ""})
        _finish(held_out, "Held-out loss, nats a token", tokens)
        smoothed = f"Training loss, mean over {SMOOTHED:.0%} of the steps of each run"
        _finish(training, smoothed, tokens)
        handles, labels = held_out.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", handlelength=3)
        return pictures.saved(figure, kind, dpi=150)


def _coloured(runs: Sequence[Compared]) -> list[int]:
    """Return the numbers of the runs with a colour: all, or those with the lowest losses, in the order of the table."""
    numbers = list(range(len(runs)))
    if len(runs) > MOST:

        def order(number: int) -> float:
            loss = runs[number].loss
            return math.inf if loss is None or math.isnan(loss) else loss

        numbers = sorted(sorted(numbers, key=order)[:MOST])
    return numbers


def _style(place: int) -> dict[str, Any]:
    dashed = place >= len(COLOURS)
    return {
        "color": COLOURS[place % len(COLOURS)],
        "linestyle": (0, (4, 1.5)) if dashed else "-",
        "marker": MARKERS[place],
        "linewidth": 1.4,
        "markersize": 4,
        "zorder": 3,
    }


def _grey() -> dict[str, Any]:
    return {"color": GREY, "linestyle": "-", "marker": "", "linewidth": 0.9, "zorder": 2}


def _label(run: Compared, comparison: RunComparison) -> str:
    rows = "" if comparison.comparable or run.rows is None else f" (rows {run.rows})"
    return f"{shortened(run.name)}{rows}{' *' if run.best else ''}"


def _smoothed(history: History) -> list[Point]:
    points = [(step["step"], float(step["loss"])) for step in history.steps]
    return trailing_means(points, thinned(points), max(1, round(SMOOTHED * len(points))))


def _draw(axes: "Axes", points: list[Point], history: History, tokens: bool, **style: Any) -> None:
    """Draw a curve; one that has no point is drawn empty, for the legend."""
    steps, losses = [step for step, _ in points], [loss for _, loss in points]
    taken = [step["step"] for step in history.steps]
    totals = [0, *accumulate(step["tokens"] for step in history.steps)]
    across = [totals[bisect_right(taken, step)] for step in steps] if tokens else steps
    axes.plot(across, losses, clip_on=False, **style)


def _finish(axes: "Axes", title: str, tokens: bool) -> None:
    axes.set_title(title, fontsize=9.5, loc="left")
    axes.set_xlabel("tokens trained on" if tokens else "step", color=MUTED)
    lines: list[Any] = list(axes.get_lines())
    values = [float(y) for line in lines for y in line.get_ydata() if math.isfinite(y)]
    low, high = min(values, default=0.0), max(values, default=1.0)
    room = HEADROOM * (high - low) or HEADROOM
    axes.set_ylim(low - room, high + room)
    if 0 < LOGARITHMIC * low <= high:
        from matplotlib.ticker import LogLocator, NullLocator

        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_ylim(low * (low / high) ** HEADROOM, high * (high / low) ** HEADROOM)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.locator_params("x", nbins=6, integer=True)
    axes.set_xlim(0, max((float(x) for line in lines for x in line.get_xdata()), default=0) or 1)
    axes.grid(axis="y")
