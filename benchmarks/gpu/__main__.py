"""Measure on a GPU whatever fits into a few minutes, the most valuable first, and keep every line that is done.

    python -m benchmarks.gpu --out DIR [--minutes 10] [--only NAME ...]
    python -m benchmarks.gpu --list
    python -m benchmarks.gpu --out DIR --device cpu --tiny      tests this program on a CPU

Each item runs in a process of its own with a time limit. Every result is appended to DIR/gpu.jsonl at once, on the disk
before the next one is measured, so a record that is cut short keeps all before. An item that fails or takes too long
has its error as its line, and the others go on. Standard error of all items is in DIR/gpu.log. Exits with 1 if an
item failed.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

from benchmarks.gpu.items import ITEMS, Item

ROOT = Path(__file__).parents[2]
LAST_LINES = 12
"""lines of an item's standard error in the record of its failure"""


def main() -> int:
    """Run the command line."""
    options = parser().parse_args()
    chosen = [item for item in ITEMS if options.only is None or item.name in options.only]
    if options.list:
        for item in chosen:
            print(f"{item.name:10}{item.seconds:5} s   {item.purpose}")
        print(f"{'together':10}{sum(item.seconds for item in chosen):5} s")
        return 0
    if options.out is None:
        parser().error("--out is missing: the folder for the record")
    options.out.mkdir(parents=True, exist_ok=True)
    arguments = ["--device", options.device, *(["--tiny"] if options.tiny else []), "--cache", options.cache]
    end, failed = time.monotonic() + 60 * options.minutes, 0
    for item in chosen:
        left = end - time.monotonic()
        if left < item.seconds and not options.tiny:
            append(
                options.out, {"item": item.name, "skipped": f"{left:.0f} s are left, {item.seconds} needed"}
            )
            continue
        failed += not run(item, arguments, options.out, min(item.limit, left))
    return int(failed > 0)


def parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n\n")[0]
    )
    made.add_argument("--out", type=Path, help="folder for the record")
    made.add_argument("--minutes", type=float, default=10, help="begin no item that does not fit into them")
    made.add_argument("--only", nargs="+", choices=[item.name for item in ITEMS], help="items to measure")
    made.add_argument("--list", action="store_true", help="print the items and their expected seconds")
    made.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    made.add_argument("--tiny", action="store_true", help="tiny sizes, to test this program")
    made.add_argument("--cache", default="~/.cache/qlora-speed", help="folder for the NF4 checkpoints")
    return made


def run(item: Item, arguments: list[str], out: Path, limit: float) -> bool:
    """Run one item and append its lines; return False, with the error in the record, if it failed."""
    print(f"{item.name}: {item.purpose}", file=sys.stderr, flush=True)
    started = time.monotonic()
    command = [sys.executable, *item.command, *arguments]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "PYTHONUNBUFFERED": "1",
    }
    if "cpu" in arguments:
        environment["TRITON_INTERPRET"] = "1"
    with (out / "gpu.log").open("a+") as log:
        log.seek(0, os.SEEK_END)
        begin = log.tell()
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, env=environment, cwd=ROOT, text=True,
            start_new_session=True,
        )  # fmt: skip
        late = threading.Event()

        def end_it() -> None:
            late.set()
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started

        timer = threading.Timer(max(1.0, limit), end_it)
        timer.start()
        try:
            assert process.stdout is not None
            with process.stdout:
                good = relay(process.stdout, item, out)
            code = process.wait()
        finally:
            timer.cancel()
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        line: dict[str, Any] = {"item": item.name, "seconds": round(time.monotonic() - started, 1)}
        if code != 0:
            log.seek(begin)
            why = f"not done after {limit:.0f} s" if late.is_set() else f"exit code {code}"
            line |= {"error": why, "stderr": log.read().splitlines()[-LAST_LINES:]}
        append(out, line)
    return code == 0 and good


def relay(output: IO[str], item: Item, out: Path) -> bool:
    """Append every line of an item to the record; return False if one of them reports an error."""
    good = True
    for text in output:
        try:
            line = json.loads(text)
        except ValueError:
            line = {"error": f"no JSON: {text.strip()[:200]}"}
        good = good and "error" not in line
        append(out, {"item": item.name, **line})
    return good


def append(out: Path, line: dict[str, Any]) -> None:
    """Append one line to the record, and wait until the disk has it."""
    with (out / "gpu.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


if __name__ == "__main__":
    sys.exit(main())
