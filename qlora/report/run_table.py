"""The table of several runs, one row a run."""

from collections.abc import Callable, Iterator

from qlora.recipe.sizes import unit_for
from qlora.report.headlines import duration, perplexity
from qlora.report.run_comparison import Compared, RunComparison, setting_text, shortened

Column = tuple[str, Callable[[Compared], str]]
"""heading and text of a cell"""


def table(comparison: RunComparison) -> tuple[list[str], list[list[str]]]:
    """Return the headings and the rows. Columns that are empty in all rows are left out."""
    columns = list(_columns(comparison))
    cells = [[cell(run) for run in comparison.runs] for _, cell in columns]
    kept = [number for number, column in enumerate(cells) if any(column)]
    heads = [columns[number][0] for number in kept]
    return heads, [[cells[number][row] for number in kept] for row in range(len(comparison.runs))]


def legend(comparison: RunComparison) -> Iterator[str]:
    """Yield the lines around the table: what all runs share, the meaning of marks, and where memory peaks."""
    runs = comparison.runs
    shared = [
        f"{label} {values.pop()}"
        for label, values in (("base", {run.base for run in runs}), ("method", {run.method for run in runs}))
        if len(values) == 1 and None not in values
    ]
    if shared and len(runs) > 1:
        yield f"the same in all runs: {', '.join(shared)}"
    if any(run.best for run in runs):
        yield "* the lowest held-out loss of the finished runs" + (
            "" if comparison.comparable else " with the same letter"
        )
    peaks = sorted({run.measured_peak for run in runs if run.measured_peak})
    if peaks:
        yield f"peak memory is that of the run's own parts, in {' or '.join(peaks)}, as in memory.json"


def _columns(comparison: RunComparison) -> Iterator[Column]:
    runs = comparison.runs
    sizes = [size for run in runs for size in (run.forecast_bytes, run.measured_bytes) if size is not None]
    unit = unit_for(max(sizes, default=0))

    def size(size_bytes: int | None) -> str:
        return "" if size_bytes is None else unit.number(size_bytes)

    yield "run", lambda run: f"{shortened(run.name)}{' *' if run.best else ''}"
    for key in comparison.keys:
        yield key.replace(".", ".\n", 1), lambda run, key=key: _setting(run, key)  # type: ignore[misc]
    if len({run.base for run in runs}) > 1:
        yield "base", lambda run: shortened(run.base or "?")
    if len({run.method for run in runs}) > 1:
        yield "method", lambda run: run.method or "?"
    yield "steps", _steps
    if not comparison.comparable:
        yield "held-out\nrows", lambda run: run.rows or ""
    yield "held-out\nbefore", lambda run: _loss(run.loss_before)
    yield "loss\nafter", lambda run: _loss(run.loss)
    if any(run.loss_step not in (None, run.steps) for run in runs):
        yield "at\nstep", lambda run: _count(run.loss_step)
    if any(run.loss is not None and run.lowest_step not in (None, run.loss_step, run.steps) for run in runs):
        yield "lowest", lambda run: _loss(run.lowest_loss)
        yield "at\nstep", lambda run: _count(run.lowest_step)
    yield "perplexity\nafter", lambda run: "" if run.loss is None else perplexity(run.loss)
    yield f"forecast\n{unit.name}", lambda run: size(run.forecast_bytes)
    yield f"peak\n{unit.name}", lambda run: size(run.measured_bytes)
    yield "tokens\na second", lambda run: "" if not run.tokens_per_second else f"{run.tokens_per_second:,.0f}"
    yield "time", lambda run: "" if run.seconds is None else duration(run.seconds)
    yield "status", lambda run: run.status


def _setting(run: Compared, key: str) -> str:
    if key in run.settings:
        return setting_text(run.settings[key])
    return "?" if run.method is None else "–"  # an unreadable recipe, or a setting without effect


def _steps(run: Compared) -> str:
    of = f" of {run.total_steps:,}" if run.total_steps not in (None, run.steps) else ""
    return f"{run.steps:,}{of}"


def _loss(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.4f}"


def _count(step: int | None) -> str:
    return "" if step is None else f"{step:,}"
