"""Damage what a user can give to the package, at random, and count what it says to it.

    python -m benchmarks.faults                                   every sweep in full, about an hour on a core
    python -m benchmarks.faults recipes rows --cases 50           a short try of two sweeps
    python -m benchmarks.faults --out faults.jsonl                can be stopped and repeated

Each case runs a command of qlora in a process of its own, with a time limit. Faults are printed as JSON lines, and the
counts as a table. Exit code 1 if there was a fault.
"""

import argparse
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

from benchmarks.faults import adapters, bases, errors, recipes, rows, runs, sweep

SWEEPS = {module.SWEEP.name: module.SWEEP for module in (bases, recipes, rows, adapters, errors, runs)}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 1 if there was a fault."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    about = ", ".join(f"{one.name} ({one.about}, {one.cases:,} cases)" for one in SWEEPS.values())
    parser.add_argument("sweeps", nargs="*", metavar="SWEEP", help=f"{about}; default: all")
    parser.add_argument("--cases", type=int, help="number of cases of each sweep; default: its own")
    parser.add_argument("--seed", type=int, default=0, help="number of the first case")
    parser.add_argument(
        "--out", type=Path, help="file of the outcomes; cases that it holds are not run again"
    )
    given = parser.parse_args(arguments)
    if unknown := set(given.sweeps) - SWEEPS.keys():
        parser.error(f"no such sweep: {', '.join(sorted(unknown))}; there are {', '.join(SWEEPS)}")
    counts: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["QLORA_CACHE"] = cache  # the cache of the user stays as it is
        for name in given.sweeps or SWEEPS:
            one = SWEEPS[name]
            numbers = range(given.seed, given.seed + (given.cases or one.cases))
            counts[name] = sweep.run(one, numbers, given.out)
    print(sweep.table(counts))
    return int(any(counter.keys() - {*sweep.CLEAN} for counter in counts.values()))


if __name__ == "__main__":
    sys.exit(main())
