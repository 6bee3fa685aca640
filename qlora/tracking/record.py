"""metrics.jsonl: the record of a run, one JSON object per line. All trackers show copies of it."""

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qlora.errors import ModelError, SaveError
from qlora.storage import atomic, regular_file
from qlora.tracking.sink import Metrics, Sample, Sink


class Record(Sink):
    """Appends lines to `path`. Each line is completely written before the call returns.

    `resume_step` is the step of the checkpoint that a run resumes from. Lines of later steps, and a last line that a
    kill cut off, are removed first, so that every step is in the file once; with `evaluation_due` also the evaluation
    of `resume_step`, which is repeated. 0 starts an empty file.

    A line that cannot be written (a full disk) is kept and written with the next one; training continues.
    `finish` raises SaveError if lines are still missing.
    """

    def __init__(self, path: Path, resume_step: int = 0, evaluation_due: bool = False) -> None:
        self.path = path
        kept = _lines_until(path, resume_step) if resume_step else []
        if evaluation_due:
            kept = [line for line in kept if _step(line) < resume_step or b'"loss"' in line]
        self._steps = {json.loads(line)["step"] for line in kept if b'"loss"' in line}
        self._sum = hashlib.sha256(b"".join(kept))
        atomic.write(path, b"".join(kept))
        try:
            flags = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW
            self._file = os.fdopen(os.open(path, flags), "ab", buffering=0)
        except OSError as error:
            raise SaveError(f"cannot write {path}: {error.strerror}") from error
        self._pending: list[bytes] = []
        self._problem: OSError | None = None

    def step(self, record: Metrics) -> None:
        """Append the record."""
        self._append(record)

    def evaluation(self, record: Metrics) -> None:
        """Append the record and fsync the file."""
        self._append(record)
        self.sync()

    def sync(self) -> str | None:
        """Flush the file to disk, and return the SHA-256 of its content; None if lines are still to be written."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            self._problem = error
        return None if self._pending else self._sum.hexdigest()

    def damage(self, sha256: str | None, step: int) -> str | None:
        """Return what is wrong with the lines of the first `step` steps, whose SHA-256 was this; None if nothing is."""
        if sha256 in (None, self._sum.hexdigest()):
            return None
        missing = sorted({*range(1, step + 1)} - self._steps)
        what = "lines were changed"
        if missing:
            what = f"{len(missing):,} of {step:,} steps are missing, the first is step {missing[0]}"
        return (
            f"{self.path}: damaged since the checkpoint was written: {what}. The training continues exactly; curves "
            "and speeds of the steps before are incomplete"
        )

    def samples(self, samples: Sequence[Sample], step: int) -> None:
        """Append one line `{"step": ..., "samples": [{"prompt", "reference", "answer"}, ...]}`, and any `before`."""
        if samples:
            self._append({"step": step, "samples": [_stored(sample) for sample in samples]})

    def finish(self, summary: Metrics, *, failed: bool = False) -> None:
        """Close the file. Raises SaveError if lines could not be written."""
        self._flush()
        self._file.close()
        if self._problem is not None and not failed:
            raise SaveError(f"cannot write {self.path}: {self._problem.strerror}")

    def _append(self, record: Metrics) -> None:
        line = json.dumps({key: _plain(value) for key, value in record.items()})
        self._pending.append(line.encode() + b"\n")
        self._flush()

    def _flush(self) -> None:
        """Write all pending lines, or none of them."""
        data = b"".join(self._pending)
        size = self._file.seek(0, os.SEEK_END)
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            self._file.truncate(size)
            self._problem = error
        else:
            self._sum.update(b"".join(self._pending))
            self._pending.clear()
            self._problem = None


def _stored(sample: Sample) -> dict[str, str]:
    return {key: text for key, text in asdict(sample).items() if text or key != "before"}


def _plain(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, with "nan" and "inf", which float() reads."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _lines_until(path: Path, last_step: int) -> list[bytes]:
    """Return the complete lines of steps up to `last_step`. Raises ModelError if the file cannot be read."""
    try:
        lines = regular_file.read(path).splitlines(keepends=True)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ModelError(
            f"{path}: damaged: {error.strerror}. Restore it from a copy, or move it away: the training continues "
            "exactly, and the curves lack the steps before"
        ) from error
    return [line for line in lines if 0 <= _step(line) <= last_step]


def _step(line: bytes) -> int:
    """Return the step of a line; -1 if the line is not a complete record."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return -1
    return step if isinstance(step, int) and line.endswith(b"\n") else -1
