"""A sweep: many cases of one kind of damage, each judged, and kept in a file so that a sweep can be continued.

A case is clean if the command works with the same result, or ends with a documented exit code and one message that
names the damaged file or key. Everything else is a fault: a traceback, a hang, another exit code, a message without the
place, a result that changed without a word.
"""

import json
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.faults.child import HANG, Ended

EXIT_CODES = {0, 2, 3, 4, 5, 6, 74, 130, 143}
"""the documented exit codes"""

CLEAN = ("works", "named", "same")
"""kinds of a clean case: the command works, it names the damage, or a run has ended with the same adapter"""

SECONDS = 60.0
"""a command that takes longer hangs"""


@dataclass(frozen=True)
class Judged:
    """The outcome of a case."""

    kind: str
    """one of CLEAN, or the kind of the fault"""
    what: str
    """the damage in words"""
    said: str = ""
    """the end of what the command printed"""


Case = Callable[[random.Random, Path], Judged]
"""(randomness of this case, empty folder) -> outcome"""


@dataclass(frozen=True)
class Sweep:
    """One kind of damage."""

    name: str
    about: str
    cases: int
    """number of cases of a whole sweep"""
    open: Callable[[Path], Case]
    """makes what all cases share in a folder, and returns the function that runs a case"""


def run(sweep: Sweep, numbers: Iterable[int], file: Path | None) -> Counter[str]:
    """Run the cases with these numbers that `file` does not hold yet; return how often each kind came.

    Each outcome is appended to `file` as a JSON line. Faults are printed.
    """
    earlier = {line["case"]: line["kind"] for line in _lines(file) if line["sweep"] == sweep.name}
    counts = Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        case: Case | None = None
        for number in numbers:
            if number in earlier:
                counts[earlier[number]] += 1
                continue
            case = case or sweep.open(_empty(Path(folder) / "shared"))
            judged = case(random.Random(f"{sweep.name} {number}"), _empty(Path(folder) / "case"))
            counts[judged.kind] += 1
            line = json.dumps({"sweep": sweep.name, "case": number, **asdict(judged)})
            if file is not None:
                with file.open("a") as stream:
                    stream.write(f"{line}\n")
            if judged.kind not in CLEAN:
                print(line, flush=True)
    return counts


def judge(ended: Ended, names: Iterable[str], what: str) -> Judged:
    """Judge a command by its end alone.

    Args:
        ended: the end of its process.
        names: texts of which its message must contain one, such as the name of the damaged file.
        what: the damage in words.
    """
    said = ended.said[-1500:]
    if ended.code == HANG:
        return Judged("hang", what, said)
    if ended.is_traceback:
        return Judged("traceback", what, said)
    if ended.code < 0:
        return Judged("killed", what, said)
    if ended.code not in EXIT_CODES:
        return Judged(f"exit {ended.code}", what, said)
    if ended.code == 0:
        return Judged("works", what)
    return Judged("named" if any(name in ended.err for name in names) else "unnamed", what, said)


def table(counts: dict[str, Counter[str]]) -> str:
    """Return the counts as a table of Markdown: one row for each sweep, one column for each kind."""
    faults = sorted({kind for counter in counts.values() for kind in counter} - {*CLEAN})
    kinds = [*CLEAN, *faults]
    rows = [["sweep", "cases", *kinds], ["---", *["---:"] * (len(kinds) + 1)]]
    rows += [
        [name, f"{counter.total():,}", *(f"{counter[kind]:,}" for kind in kinds)]
        for name, counter in counts.items()
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _lines(file: Path | None) -> Iterator[dict[str, Any]]:
    """Yield the kept outcomes; a line that a kill cut short is no outcome."""
    for line in file.read_text().splitlines() if file is not None and file.exists() else ():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def _empty(folder: Path) -> Path:
    """Make an empty folder, in place of one of this name."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
