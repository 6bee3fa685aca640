"""Measure the GPU memory of qlora and of other trainers with torch's own allocator, on a null GPU.

    python -m benchmarks.null_gpu -m benchmarks.null_gpu.peers --preset llama-3.1-8b

Runs the contenders of `benchmarks.speed`, each in a fresh process for one warm-up step and three more. Prints a
Markdown table: the peak memory of a step, in use (allocated) and taken from the driver (reserved); the same for the
whole process, including loading; and the host's seconds per step. The host does not slow a GPU down that takes longer
than these. Losses and GPU speed are not measured.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from benchmarks.speed.contenders import Contender, chosen
from benchmarks.speed.prepare import Setting
from benchmarks.speed.presets import PRESETS
from benchmarks.speed.report import table
from benchmarks.speed.rounds import Runner

GIB = 2**30
WARMUP, STEPS = 1, 3


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--preset", default="llama-3.1-8b", choices=PRESETS)
    parser.add_argument("--sequences", type=int)
    parser.add_argument("--length", type=int)
    parser.add_argument("--contenders")
    parser.add_argument("--cache", default="~/.cache/qlora-null-gpu/bases")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error(
            "torch finds no CUDA device: start this script with `python -m benchmarks.null_gpu -m ...`"
        )
    preset = PRESETS[arguments.preset].change(sequences=arguments.sequences, length=arguments.length)
    setting = Setting(preset, steps=WARMUP + STEPS, cache=str(Path(arguments.cache).expanduser()))
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        runner, folder = Runner(), Path(scratch)
        job = runner.prepare(setting, folder).job(setting, warmup=WARMUP)
        for contender in chosen(arguments.contenders, "cuda", real=False):
            answer = runner.run(contender, job, folder)
            rows.append(row(contender, answer.memory, answer.seconds, answer.error))
            print(*rows[-1], flush=True)
    print(f"\n{preset.name}, {preset.sequences} x {preset.length:,} tokens\n")
    columns = (
        "step, allocated",
        "step, reserved",
        "process, allocated",
        "process, reserved",
        "host, s per step",
    )
    print(table(["GiB", *columns], rows))


def row(contender: Contender, memory: dict[str, int], seconds: list[float], error: str | None) -> list[str]:
    """Return one row of the table."""
    if error is not None:
        return [contender.name, error.splitlines()[0][:80], "", "", "", ""]
    peaks = [
        memory["train_allocated"],
        memory["train_reserved"],
        max(size for name, size in memory.items() if name.endswith("_allocated")),
        max(size for name, size in memory.items() if name.endswith("_reserved")),
    ]
    return [contender.name, *(f"{size / GIB:.2f}" for size in peaks), f"{min(seconds[WARMUP:]):.2f}"]


if __name__ == "__main__":
    main()
