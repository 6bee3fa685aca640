"""Key figures of a run, at the top of the page."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qlora.recipe import Recipe
from qlora.recipe.sizes import unit_for
from qlora.report.history import History
from qlora.report.memory_comparison import Comparison

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Headline:
    """A key figure: its label, its value and a note that puts the value into context."""

    label: str
    value: str
    note: str = ""


def headlines(recipe: Recipe, history: History, result: Json | None, memory: Json | None) -> list[Headline]:
    """Return the known ones of loss, steps, time, speed and memory.

    Args:
        recipe: the run's recipe.
        history: the run's metrics.jsonl.
        result: content of result.json; None while the run is unfinished.
        memory: content of memory.json, if the run was forecast.
    """
    figures = [
        *_loss(history, result),
        _steps(recipe, history, result),
        *_time(history, result),
        *_speed(history),
        *_memory(history, result, memory),
    ]
    return [headline for headline in figures if headline.value]


def _loss(history: History, result: Json | None) -> Iterator[Headline]:
    losses = history.held_out_losses
    if len(losses) > 1:
        (_, before), (last, after) = losses[0], losses[-1]
        at = ""
        if result is not None and result.get("result_step", last) != last:  # the best weights, not the last
            after, at = result["loss_after"], f", at step {result['result_step']}"
        note = f"perplexity {perplexity(before)} before, {perplexity(after)} after{at}"
        yield Headline("Held-out loss", f"{before:.3f} → {after:.3f}", note)
    elif losses:
        step, loss = losses[0]
        yield Headline("Held-out loss", f"{loss:.3f}", f"at step {step}, perplexity {perplexity(loss)}")
    elif history.steps:
        yield Headline(
            "Training loss", f"{float(history.steps[-1]['loss']):.3f}", "at the last step; no held-out rows"
        )


def perplexity(loss: float) -> str:
    """Return exp(loss) as text."""
    return f"{math.exp(loss):,.4g}" if loss < 100 else "out of range"


def _steps(recipe: Recipe, history: History, result: Json | None) -> Headline:
    total = result["total_steps"] if result else recipe.training.max_steps
    return Headline(
        "Steps",
        f"{history.last_step:,}" + (f" of {total:,}" if total else ""),
        f"{recipe.training.global_batch_size} rows each",
    )


def _time(history: History, result: Json | None) -> Iterator[Headline]:
    """Yield the run's time.

    In an earlier version, the result of a resumed run covered only its last session. If the steps took longer, their
    time is shown.
    """
    if result and result["seconds"] >= history.seconds:
        yield Headline("Time", duration(result["seconds"]), f"{duration(history.seconds)} of it in steps")
    elif history.steps:
        yield Headline("Time", duration(history.seconds), "in steps, without loading and evaluations")


def duration(seconds: float) -> str:
    """Return a duration as text: `54 s`, `12 min 5 s`, `3 h 20 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, left = divmod(minutes, 60)
    return f"{hours} h {left} min" if hours else f"{minutes} min {rest} s"


def _speed(history: History) -> Iterator[Headline]:
    if history.steps:
        tokens = sum(step["tokens"] for step in history.steps)
        supervised = sum(step["supervised_tokens"] for step in history.steps)
        yield Headline(
            "Tokens a second", f"{history.tokens_per_second:,.0f}",
            f"{tokens:,} in total, {supervised / tokens:.0%} of them trained",
        )  # fmt: skip


def _memory(history: History, result: Json | None, memory: Json | None) -> Iterator[Headline]:
    if memory is not None:
        comparison = Comparison(memory)
        peak, forecast = comparison.best["total_bytes"], comparison.forecast["total_bytes"]
        unit = comparison.unit
        if comparison.measured:
            note = (
                f"in {comparison.best['peak']}; forecast {unit.number(forecast)} ({comparison.total.error})"
            )
            yield Headline("Peak memory", unit.text(peak), note)
        else:
            yield Headline("Peak memory, forecast", unit.text(peak), f"in {comparison.best['peak']}")
    elif result:
        allocated, resident = result["memory"]["allocated_bytes"], result["memory"]["resident_bytes"]
        size, note = (
            (resident, "resident on the host")
            if allocated is None
            else (allocated, "allocated on the device")
        )
        yield Headline("Peak memory", unit_for(size).text(size), note)
    elif history.evaluations:
        size = history.evaluations[-1]["peak_memory_bytes"]
        yield Headline(
            "Peak memory", unit_for(size).text(size), f"up to step {history.evaluations[-1]['step']:,}"
        )
