"""Kill a training run at random times, resume it each time, and compare its result with an uninterrupted run.

    python -m benchmarks.kills --kills 25              about ten minutes on two CPU cores
    python -m benchmarks.kills --kills 2 --steps 8     a short try

Both runs train the quickstart with dropout and checkpoints. SIGKILL ends the process after a random time, so that it
cannot react; the kill can hit any work, from the first import to the last file. A process that ends before its kill is
not counted. A last start without a kill finishes the run. The script fails unless the adapter's bytes and every
recorded loss are the same. With `--out benchmarks/reports` it writes kills_<yyyy-mm>.md and a picture there.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.speed.machine import describe
from qlora.report.pictures import ACCENT, MUTED, SECOND, figure, png

TIMES = ("tokens_per_second", "peak_memory_bytes")
"""fields of metrics.jsonl that differ between any two runs"""


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0, help="seed of the random times")
    parser.add_argument("--out", type=Path, help="folder for the report and its picture; default: only print")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        whole, killed = Path(scratch) / "whole", Path(scratch) / "killed"
        began = time.monotonic()
        train(whole, arguments.steps)
        seconds = time.monotonic() - began
        print(f"uninterrupted: {seconds:.0f} s, adapter {digest(whole)[:16]}")
        kills = kill_and_resume(
            killed, arguments.steps, arguments.kills, seconds, random.Random(arguments.seed)
        )
        same = digest(whole) == digest(killed) and records_of(whole) == records_of(killed)
        print(
            f"killed {len(kills)} times: adapter {digest(killed)[:16]}, {'the same' if same else 'DIFFERENT'}"
        )
        if arguments.out:
            write_report(arguments, whole, killed, kills, same)
    if not same:
        sys.exit("the killed run ended with a different adapter or different losses")


def command(run: Path, steps: int, *options: str) -> list[str]:
    """Return the command of a small training run with dropout, evaluations and checkpoints."""
    settings = [
        f"training.max_steps={steps}", "training.save_every=5", "training.eval_every=20", "training.samples=0",
        "adapter.dropout=0.1", "optimizer.warmup_steps=4", "tracking.wandb.mode=disabled", f"output={run}",
    ]  # fmt: skip
    return [sys.executable, "-m", "qlora", "train", "quickstart", *settings, *options]


def train(run: Path, steps: int, *options: str) -> None:
    """Run the training to its end."""
    subprocess.run(command(run, steps, *options), check=True, stdout=subprocess.DEVNULL)


def kill_and_resume(run: Path, steps: int, kills: int, seconds: float, chance: random.Random) -> list[int]:
    """Kill the run `kills` times, then finish it; return the last recorded step at each kill."""
    reached: list[int] = []
    while len(reached) < kills:
        process = subprocess.Popen(
            command(run, steps, "--resume"), stdout=subprocess.DEVNULL, start_new_session=True
        )
        # A start takes longer than a few steps, so kills are drawn from the first third of a run's time
        instant = chance.uniform(0, seconds / 3)
        try:
            process.wait(instant)
            if process.returncode:
                sys.exit(f"the run failed on its own with exit code {process.returncode}")
            print("  the run ended before its kill; start again from step 0")
            shutil.rmtree(run)
            reached.clear()
            continue
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        records = records_of(run)
        reached.append(records[-1]["step"] if records else 0)
        print(f"  killed after {instant:5.2f} s, at step {reached[-1]}")
    train(run, steps, "--resume")
    return reached


def digest(run: Path) -> str:
    """Return the SHA-256 of the adapter's file."""
    return hashlib.sha256((run / "adapter/adapter_model.safetensors").read_bytes()).hexdigest()


def records_of(run: Path) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl without times, and without a last line that a kill cut short."""
    file = run / "metrics.jsonl"
    records = []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        records.append({key: value for key, value in record.items() if key not in TIMES})
    return records


def write_report(
    arguments: argparse.Namespace, whole: Path, killed: Path, kills: list[int], same: bool
) -> None:
    """Write the report and its picture."""
    machine = describe("cpu", None)
    name = f"kills_{machine['date'][:7]}"
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"{name}.png").write_bytes(picture(records_of(whole), records_of(killed), kills))
    versions = ", ".join(
        f"{package} {machine['versions'][package]}" for package in ("torch", "transformers", "bitsandbytes")
    )
    (arguments.out / f"{name}.md").write_text(
        f"""# Killed {len(kills)} times

`python -m benchmarks.kills --kills {len(kills)} --steps {arguments.steps} --seed {arguments.seed}`, {machine["date"]},
commit {machine["commit"]}, {machine["machine"]} with {machine["cores"]} cores ({machine["cpu_capability"]}), Python
{machine["python"]}, {versions}.

A run of {arguments.steps} steps was killed with SIGKILL and resumed, {len(kills)} times at random moments. Last
recorded steps at the kills: {", ".join(map(str, kills))}.

| | SHA-256 of the adapter |
|---|---|
| uninterrupted | `{digest(whole)}` |
| killed {len(kills)} times | `{digest(killed)}` |

The adapter and every recorded loss {"are equal, bit for bit" if same else "DIFFER"}.

![Training loss of both runs, with the kills]({name}.png)
"""
    )


def picture(whole: list[dict[str, Any]], killed: list[dict[str, Any]], kills: list[int]) -> bytes:
    """Draw the training loss of both runs over the steps, with a mark at each kill."""
    with figure(7, 2.8) as drawing:
        axes = drawing.subplots()
        styles: list[tuple[list[dict[str, Any]], dict[str, Any]]] = [
            (whole, {"color": ACCENT, "lw": 3.5, "alpha": 0.35, "label": "never killed"}),
            (killed, {"color": ACCENT, "lw": 1.1, "label": f"killed {len(kills)} times and resumed"}),
        ]
        for records, style in styles:
            points = [(record["step"], record["loss"]) for record in records if "loss" in record]
            axes.plot(*zip(*points, strict=True), **style)
        axes.plot(kills, [0] * len(kills), "x", color=SECOND, ms=5, clip_on=False, label="SIGKILL")
        axes.set(
            xlabel="step",
            title="Training loss of a run that was killed, over that of one that was not",
            xlim=(0, whole[-1]["step"]),
            ylim=(0, None),
        )
        axes.xaxis.label.set_color(MUTED)
        axes.grid(axis="y")
        axes.legend()
        drawing.tight_layout()
        return png(drawing)


if __name__ == "__main__":
    main()
