"""Time the steps of qlora with nothing, the MLPs or all layers recomputed, in turns in one process.

    python -m benchmarks.speed.turns --preset cpu [--rounds 6]

The machine's speed differs more between processes than these forms do, so the forms alternate within one process.
Prints the seconds per step of each form: the median and all values.
"""

import argparse
import time
from pathlib import Path
from statistics import median

import torch

from benchmarks.speed.contenders.qlora import Session
from benchmarks.speed.prepare import Setting, prepare
from benchmarks.speed.presets import PRESETS
from benchmarks.speed.workload import Workload
from qlora.model.checkpointing import checkpoint_layers, decoder_layers


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--preset", default="cpu", choices=PRESETS)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--cache", default="~/.cache/qlora-speed")
    arguments = parser.parse_args()
    cache = str(Path(arguments.cache).expanduser())
    setting = Setting(PRESETS[arguments.preset], steps=3, dtype=arguments.dtype, cache=cache)
    job = prepare(setting).job(setting)
    session = Session(job)
    documents = Workload.load(job.workload).steps[0]
    layers = len(decoder_layers(session.model))
    forms = {
        "nothing recomputed": (0, 0),
        "MLPs recomputed": (0, layers),
        "all layers recomputed": (layers, 0),
    }
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for number in range(arguments.rounds + 1):  # the first round warms up
        for name, counts in forms.items():
            checkpoint_layers(session.model, *counts)
            started = time.perf_counter()
            session.step(number, documents)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - started)
    for name, (_, *timed) in seconds.items():
        print(f"{name:24}{median(timed):6.2f} s   ({', '.join(f'{value:.2f}' for value in timed)})")


if __name__ == "__main__":
    main()
