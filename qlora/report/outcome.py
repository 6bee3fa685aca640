"""Outcome of a run in a few rows, for Python and notebooks: losses, metrics, steps, memory, files."""

import json
import os
import signal
from collections.abc import Mapping
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import Any

from qlora.recipe.sizes import unit_for
from qlora.report.facts import Row
from qlora.report.headlines import duration
from qlora.report.memory_comparison import Comparison
from qlora.storage.json_files import without_checksum

LINKS = {"report.html": "the run on one page", "adapter": "the trained adapter", "model": "the trained model"}
"""files of a run that a notebook links to"""


def rows(values: Mapping[str, Any]) -> list[Row]:
    """Return labels and texts for an outcome, as `TrainResult.as_json` gives it."""
    found = []
    before, after, steps = values["loss_before"], values["loss_after"], values["steps"]
    if before is not None and after is not None:
        step = values["result_step"]
        at = f", at step {step:,}" if step not in (None, steps) else ""
        when = "at the latest evaluation" if values["result"] is None else f"after{at}"
        found.append(("held-out loss", f"{before:.4f} before, {after:.4f} {when}"))
    found += [(name, f"{value:.4g}") for name, value in (values["metrics"] or {}).items()]
    found.append(("steps", f"{steps:,} of {values['total_steps']:,}{_stopped(values)}"))
    found.append(("time", duration(values["seconds"])))
    found.append(("memory", _memory(values)))
    return [*found, ("files", f"{values['run']}/")]


def html(values: Mapping[str, Any]) -> str:
    """Return an outcome as an HTML table with links to the report and the result. All text in it is escaped."""
    cells = "".join(
        f'<tr><th style="text-align: left">{escape(label)}</th>'
        f'<td style="text-align: left">{escape(text)}</td></tr>'
        for label, text in rows(values)
    )
    run = Path(values["run"])
    links = [
        f'<a href="{escape(os.path.relpath(run / name))}" target="_blank">{escape(name)}</a>, {meaning}'
        for name, meaning in LINKS.items()
        if (run / name).exists()
    ]
    return f"<table>{cells}</table><div>{' · '.join(links)}</div>"


def _stopped(values: Mapping[str, Any]) -> str:
    """Return how a run ended that has not taken all its steps; empty for one that has."""
    if values["result"] is not None:
        return "" if values["steps"] == values["total_steps"] else "; ended early by training.patience"
    by = values["stopped_by"]
    why = signal.Signals(by).name if isinstance(by, int) else by
    return f"; stopped by {why}, continue with resume=True"


def _memory(values: Mapping[str, Any]) -> str:
    """Return the forecast beside the measurement, or the peak of the process for a run without a forecast."""
    with suppress(OSError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
        file = Path(values["run"]) / "memory.json"
        return Comparison(without_checksum(json.loads(file.read_bytes()))).peak
    allocated, resident = values["memory"]["allocated_bytes"], values["memory"]["resident_bytes"]
    size, where = (
        (resident, "resident on the host") if allocated is None else (allocated, "allocated on the device")
    )
    return f"{unit_for(size).text(size)} {where}, at the peak"
