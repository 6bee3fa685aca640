"""Run the best-tuned peers on the work of `ours`, each in a fresh process; one that is not installed is skipped."""

import dataclasses
import tempfile
from pathlib import Path
from statistics import median

from benchmarks.gpu.lines import arguments, lines
from benchmarks.gpu.work import WARMUP, job_of
from benchmarks.speed.contenders import Contender
from benchmarks.speed.rounds import Runner

PEERS = (
    Contender("qlora"),
    Contender("peft_tuned"),
    Contender("trl", ("liger",)),
    Contender("peft_tuned", ("ckpt",)),
    Contender("trl", ("ckpt", "liger")),
    Contender("unsloth", ("ckpt", "offload")),
)
"""ours once more as a reference: the others must have its losses"""


def main() -> None:
    """Run the command line."""
    options, write = arguments(__doc__), lines()
    job, runner = job_of(options), Runner(timeout=60)
    with tempfile.TemporaryDirectory() as folder:
        for contender in PEERS[:2] if options.tiny else PEERS:
            answer = runner.run(contender, job, Path(folder))
            line = {"contender": contender.name, **dataclasses.asdict(answer)}
            error = line.pop("error")
            if error is not None:
                write(line | {"skipped" if absent(error, answer.missing) else "error": error})
                continue
            seconds = median(answer.seconds[WARMUP:])
            tokens = answer.positions / len(answer.seconds) / seconds
            write(line | {"step_s": seconds, "tokens_per_s": tokens})


def absent(error: str, missing: bool) -> bool:
    """Return True if the error is only that a package is not installed."""
    return missing or "ModuleNotFoundError" in error or ("ImportError" in error and "iger" in error)


if __name__ == "__main__":
    main()
