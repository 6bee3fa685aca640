"""Compare fine-tuning methods and their settings on E2E NLG, with seeds and error bars.

    python -m benchmarks.methods run --data E2E_FOLDER --minutes 60
    python -m benchmarks.methods report

A finished cell is a line in the ledger and never runs again, so `run` can be stopped at any time and started again. Two
runs can share the ledger: `--part 1/2` and `--part 2/2`, each with one thread.
"""

import argparse
import os
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from benchmarks.methods import ledger

if TYPE_CHECKING:
    from benchmarks.methods.experiments import Experiment

REPORTS = Path(__file__).parents[1] / "reports"
LEDGER = REPORTS / "methods_cells.jsonl"
SECONDS = 40.0
"""assumed seconds of a cell, until cells have run"""


def main() -> int:
    """Run the command line."""
    arguments = parser().parse_args()
    return int(arguments.command(arguments))


def parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.methods", description=__doc__.split("\n\n")[0])
    commands = made.add_subparsers(required=True)
    for function in (base, plan, run, speed, report):
        command = commands.add_parser(function.__name__, help=(function.__doc__ or "").splitlines()[0])
        command.set_defaults(command=function)
        add = command.add_argument
        add("--ledger", type=Path, default=LEDGER, help="file of the finished cells")
        add(
            "--cache",
            type=Path,
            default=Path("~/.cache/qlora-methods").expanduser(),
            help="folder of the bases",
        )
        add("--only", action="append", help="name of an experiment; can be repeated; default: all")
        if function in (base, run, speed):
            add("--data", type=Path, required=True, help="folder of the E2E NLG data")
            add("--threads", type=int, default=1, help="threads of torch")
        if function is run:
            add(
                "--minutes",
                type=float,
                help="start no cell that would end later; default: until all are done",
            )
            add("--part", default="1/1", help="share of the cells of this process, as 1/2")
        if function is speed:
            add("--rounds", type=int, default=7, help="turns of every method")
        if function is report:
            add("--docs", type=Path, default=Path(__file__).parents[2] / "docs", help="folder of the pages")
    return made


def base(arguments: argparse.Namespace) -> int:
    """Train the base that all cells adapt, once."""
    from benchmarks.methods.base import digest, make
    from benchmarks.methods.e2e import E2E

    _threads(arguments.threads)
    folder = make(E2E.read(arguments.data), arguments.cache)
    print(f"{folder}  {digest(arguments.cache)}")
    return 0


def plan(arguments: argparse.Namespace) -> int:
    """List the unfinished cells and the time that they will take."""
    from benchmarks.methods import experiments, rows

    records = ledger.read(arguments.ledger)
    listed = _chosen(arguments.only)
    pending = list(experiments.plan(records, listed))
    for name, cell in pending:
        keys = " ".join(f"{key}={value}" for key, value in cell.setting.keys)
        weights = "" if cell.setting.weights == "16-bit" else f" {cell.setting.weights}"
        print(f"{name:<13} seed {cell.seed}  {cell.setting.method}{weights} {keys}")
    seconds = median([record["seconds"] for record in records.values()] or [SECONDS])
    screening, more = experiments.upper_count(listed)
    minutes = len(pending) * seconds / 60
    print(f"\n{len(records)} cells finished; {len(pending)} are known to be next, {minutes:.0f} minutes")
    print(
        f"in all {screening} cells of screening and up to {more} with more seeds: at most "
        f"{(screening + more) * seconds / 60:.0f} minutes at {seconds:.0f} s a cell, half with two processes"
    )
    for name, count in Counter(name for name, _ in pending).items():
        print(f"  {name}: {count}")
    if missing := rows.absent():
        print(f"not in this version of the package: {', '.join(missing)}")
    return 0


def run(arguments: argparse.Namespace) -> int:
    """Run unfinished cells, the most valuable first, and append each to the ledger."""
    from benchmarks.methods import experiments, training
    from benchmarks.methods.base import digest, make
    from benchmarks.methods.e2e import E2E
    from benchmarks.methods.machine import where
    from qlora.errors import QloraError

    _threads(arguments.threads)
    began = time.monotonic()
    data = E2E.read(arguments.data)
    make(data, arguments.cache)
    place, listed = where(arguments.threads) | {"base": digest(arguments.cache)}, _chosen(arguments.only)
    part, parts = map(int, arguments.part.split("/"))
    slowest, failed = 0.0, set[str]()
    while True:
        records = ledger.of_base(ledger.read(arguments.ledger), place["base"])
        name, cell = next(
            (
                (name, cell)
                for name, cell in experiments.plan(records, listed)
                if int(cell.key, 16) % parts == part - 1 and cell.key not in failed
            ),
            ("", None),
        )
        left = (
            float("inf") if arguments.minutes is None else 60 * arguments.minutes - (time.monotonic() - began)
        )
        if cell is None or left < slowest:
            print("nothing left to run" if cell is None else "no time left for another cell", file=sys.stderr)
            return 1 if failed else 0
        try:
            record = training.run(cell, data, arguments.cache)
        except (QloraError, RuntimeError, ValueError) as error:  # one broken method must not stop the night
            failed.add(cell.key)
            print(
                f"FAILED {name} {cell.as_json()}: {error!r}. The next run tries it again",
                file=sys.stderr,
                flush=True,
            )
            continue
        ledger.append(arguments.ledger, record | place)
        slowest = max(slowest, record["seconds"])
        print(_line(name, record), file=sys.stderr, flush=True)


def speed(arguments: argparse.Namespace) -> int:
    """Measure speed and memory of every method, in turns, on an otherwise idle machine."""
    from benchmarks.methods import speed as measurement

    _threads(arguments.threads)
    measurement.main(arguments)
    return 0


def report(arguments: argparse.Namespace) -> int:
    """Write docs/benchmarks/methods.md, its JSON and its pictures from the ledger."""
    from benchmarks.methods import report as writer

    writer.main(arguments)
    return 0


def _line(name: str, record: dict[str, object]) -> str:
    keys = " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in record["keys"].items())  # type: ignore[attr-defined]
    loss = record["loss_after"]
    shown = "diverged" if loss is None else f"loss {loss:.4f} bleu {record.get('bleu', 0):.1f}"
    return f"{name:<13} seed {record['seed']} {record['method']} {keys}  {shown}  {record['seconds']} s"


def _chosen(only: list[str] | None) -> "list[Experiment]":
    from benchmarks.methods.experiments import experiments

    made = experiments()
    names = [experiment.name for experiment in made]
    if wrong := set(only or ()) - set(names):
        raise SystemExit(
            f"--only {sorted(wrong)[0]}: no such experiment. The experiments: {', '.join(names)}"
        )
    return [experiment for experiment in made if only is None or experiment.name in only]


def _threads(count: int) -> None:
    import torch

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(count)


if __name__ == "__main__":
    sys.exit(main())
