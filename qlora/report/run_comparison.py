"""Several runs side by side: the settings that differ, their outcomes, and which losses can be compared at all."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from qlora.errors import listed
from qlora.recipe.rules import flatten, keys_without_effect
from qlora.report.run_files import RunFiles

NOT_COMPARED = ("output", "tracking", "version")
"""keys that change nothing of the training"""

OWN_COLUMNS = ("base.model", "adapter.method")

DECIDE_ROWS = ("data.", "base.model", "base.revision", "training.seed")
"""beginnings of the keys that decide which tokens are held out"""

SIZE_OF_A_STEP = ("training.global_batch_size", "data.packing", "data.max_length", "data.examples")

LONGEST = 40
"""most characters of a setting or a name in a table"""


@dataclass(frozen=True)
class Compared:
    """One run among others. A number that is not known is None; sizes are bytes, losses nats a supervised token."""

    run: str
    name: str
    """the shortest end of the path that no other run has"""
    status: str
    settings: dict[str, Any]
    """the settings that are not the same in all runs, but base and method, without those that have no effect in it"""
    base: str | None
    method: str | None
    steps: int
    total_steps: int | None
    loss_before: float | None
    loss: float | None
    """of the result; of an unfinished run, the newest one"""
    loss_step: int | None
    """step of `loss`; None in a result of an earlier version"""
    lowest_loss: float | None
    lowest_step: int | None
    perplexity: float | None
    """exp(`loss`)"""
    forecast_bytes: int | None
    measured_bytes: int | None
    """peak of the memory that the run's own parts take, as in memory.json"""
    measured_peak: str | None
    """the phase of that peak"""
    tokens_per_second: float | None
    """median over the steps"""
    seconds: float | None
    """of the whole run; of an unfinished run, of its steps"""
    device: str | None
    rows: str | None
    """letter of the held-out rows: losses of one letter can be compared; None without a held-out loss"""
    best: bool = False
    """True for the lowest loss among the finished runs of one letter"""


@dataclass(frozen=True)
class RunComparison:
    """Runs in the given order, and what a reader of their numbers must know."""

    runs: list[Compared]
    files: list[RunFiles]
    """of the same runs, in the same order"""
    keys: list[str]
    """the recipe keys that differ, without base and method"""
    notes: list[str]

    @property
    def comparable(self) -> bool:
        """True if all held-out losses are losses on the same tokens."""
        return len({run.rows for run in self.runs} - {None}) <= 1

    @property
    def same_steps(self) -> bool:
        """True if a step of each run trains on equally many rows, made in the same way."""
        return set(SIZE_OF_A_STEP).isdisjoint(self.keys)

    def as_json(self) -> dict[str, Any]:
        """Return plain values; numbers that JSON does not have are text, as in metrics.jsonl."""
        runs = [{key: _plain(value) for key, value in asdict(run).items()} for run in self.runs]
        return {"runs": runs, "keys": self.keys, "comparable": self.comparable, "notes": self.notes}


def compare(files: Sequence[RunFiles]) -> RunComparison:
    """Compare runs; see `RunComparison`."""
    settings = [_settings(run) for run in files]
    differing = _differing([values for values in settings if values])
    keys = [key for key in differing if key not in OWN_COLUMNS]
    names, letters = _names([run.folder.resolve().parts for run in files]), _letters(files)
    runs = [
        _compared(run, name, {key: values[key] for key in keys if key in values}, letter)
        for run, name, values, letter in zip(files, names, settings, letters, strict=True)
    ]
    runs = _with_best(runs)
    notes = [*_about_rows(runs, files, differing), *_about_devices(runs)]
    notes += [sentence for run in files for sentence in run.damage]
    return RunComparison(runs, list(files), keys, notes)


def _settings(run: RunFiles) -> dict[str, Any]:
    """Return the settings that have an effect in a run."""
    settings = {} if run.recipe is None else flatten(run.recipe.to_dict())
    left_out = {*keys_without_effect(settings), *NOT_COMPARED} if settings else set()
    return {
        key: value for key, value in settings.items() if left_out.isdisjoint((key, key.partition(".")[0]))
    }


def _differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys that do not have the same value in all runs in which they have an effect."""
    found: dict[str, list[Any]] = {}
    for values in settings:
        for key, value in values.items():
            found.setdefault(key, []).append(value)
    return [key for key, values in found.items() if any(value != values[0] for value in values)]


def _names(paths: Sequence[tuple[str, ...]]) -> list[str]:
    """Return the shortest ends of the paths that tell them apart."""
    for length in range(1, max(map(len, paths)) + 1):
        names = ["/".join(path[-length:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def _letters(files: Sequence[RunFiles]) -> list[str | None]:
    """Return a letter for each run with a held-out loss, the same for runs with evidence of the same rows."""
    groups: list[tuple[set[str], list[int]]] = []
    for number, run in enumerate(files):
        if not run.history.evaluations and (run.result or {}).get("loss_after") is None:
            continue
        evidence, members = _evidence(run), [number]
        same = [group for group in groups if group[0] & evidence]
        for group in same:
            groups.remove(group)
            evidence, members = evidence | group[0], [*group[1], *members]
        groups.append((evidence, members))
    letters: list[str | None] = [None] * len(files)
    for index, (_, members) in enumerate(sorted(groups, key=lambda group: min(group[1]))):
        for number in members:
            letters[number] = f"{chr(ord('A') + index % 26)}{index // 26 or ''}"
    return letters


def _evidence(run: RunFiles) -> set[str]:
    """Return the digests of the held-out tokens and of all tokens, as far as they are recorded."""
    data = (run.facts or {}).get("data")
    held_out = data.get("held_out_sha256") if isinstance(data, dict) else None
    return {digest for digest in (held_out, run.fingerprint) if isinstance(digest, str)}


def _compared(run: RunFiles, name: str, settings: dict[str, Any], rows: str | None) -> Compared:
    recipe, result, losses = run.recipe, run.result or {}, run.history.held_out_losses
    finite = [(loss, step) for step, loss in losses if math.isfinite(loss)]
    lowest_loss, lowest_step = min(finite, default=(None, None))
    step, loss = losses[-1] if len(losses) > 1 else (None, None)
    if run.result is not None:
        step, loss = result.get("result_step"), result.get("loss_after")
    before = next((loss for step, loss in losses if step == 0), result.get("loss_before"))
    forecast, measured = (_part(run.memory, name) for name in ("forecast", "measured"))
    known = _number(_part(run.facts, "memory"), "forecast_bytes")
    return Compared(
        run=str(run.folder),
        name=name,
        status=run.status,
        settings=settings,
        base=None if recipe is None else recipe.base.model,
        method=None if recipe is None else recipe.adapter.method,
        steps=int(result.get("steps", run.history.last_step)),
        total_steps=result.get("total_steps") or _number(_part(run.facts, "steps"), "total_steps"),
        loss_before=before,
        loss=loss,
        loss_step=step,
        lowest_loss=lowest_loss,
        lowest_step=lowest_step,
        perplexity=math.exp(loss) if loss is not None and loss < 100 else None,
        forecast_bytes=_number(forecast, "total_bytes") or known,
        measured_bytes=_number(measured, "total_bytes"),
        measured_peak=_text(measured, "peak"),
        tokens_per_second=run.history.tokens_per_second,
        seconds=result.get("seconds", run.history.seconds if run.history.steps else None),
        device=_text(_part(run.facts, "device"), "name"),
        rows=rows,
    )


def _part(values: Mapping[str, Any] | None, name: str) -> Mapping[str, Any]:
    part = (values or {}).get(name)
    return part if isinstance(part, dict) else {}


def _number(values: Mapping[str, Any], name: str) -> int | None:
    number = values.get(name)
    return number if isinstance(number, int) else None


def _text(values: Mapping[str, Any], name: str) -> str | None:
    text = values.get(name)
    return text if isinstance(text, str) else None


def _with_best(runs: Sequence[Compared]) -> list[Compared]:
    """Mark the lowest loss of each letter that at least two finished runs have."""
    best = {}
    for letter in {run.rows for run in runs} - {None}:
        losses = [run.loss for run in runs if run.rows == letter and _is_ranked(run)]
        if len(losses) > 1:
            best[letter] = min(loss for loss in losses if loss is not None)
    return [
        replace(run, best=_is_ranked(run) and run.rows in best and run.loss == best[run.rows]) for run in runs
    ]


def _is_ranked(run: Compared) -> bool:
    done = run.status.startswith(("finished", "ended early"))
    return done and run.loss is not None and math.isfinite(run.loss)


def _about_rows(
    runs: Sequence[Compared], files: Sequence[RunFiles], differing: Sequence[str]
) -> Iterator[str]:
    """Say which losses cannot be compared, and why."""
    if len({run.rows for run in runs} - {None}) < 2:
        return
    keys = [key for key in differing if key.startswith(DECIDE_ROWS)]
    why = f" (these settings differ: {', '.join(keys)})" if keys else ""
    yield (
        "the held-out losses are not all comparable: a letter marks runs with the same held-out tokens, and loss and "
        f"perplexity are compared within a letter only{why}"
    )
    unknown = [
        run.name
        for run, file in zip(runs, files, strict=True)
        if run.rows is not None and not _evidence(file)
    ]
    if unknown:
        yield f"{listed(unknown)}: no digest of the held-out rows is recorded, so each has a letter of its own"
    if "training.seed" in keys and not any("data.held_out" in key for key in keys):
        drawn = [file for file in files if file.recipe and not isinstance(file.recipe.data.held_out, str)]
        if drawn:
            yield (
                "training.seed also draws the held-out rows. To compare seeds, set data.held_out to a file of rows"
            )


def _about_devices(runs: Sequence[Compared]) -> Iterator[str]:
    devices: dict[str, list[str]] = {}
    for run in runs:
        if run.device is not None:
            devices.setdefault(run.device, []).append(run.name)
    if len(devices) > 1:
        shown = "; ".join(f"{device}: {listed(names)}" for device, names in devices.items())
        yield f"speed, time and memory come from different devices. {shown}"


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def setting_text(value: Any) -> str:
    """Return a setting as a recipe shows it, on one line of at most LONGEST characters."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return shortened(" ".join(text.split()))


def shortened(text: str) -> str:
    """Return a text with at most LONGEST characters; its middle is left out."""
    if len(text) <= LONGEST:
        return text
    half = (LONGEST - 1) // 2
    return f"{text[:half]}…{text[-half:]}"
