"""Compare speed and memory of a training step with other trainers.

Run it from the root of the repository:

    python -m benchmarks.speed --preset cpu --rounds 3 --out benchmarks/reports
"""

import argparse
import shlex
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks.speed import growth, machine, report
from benchmarks.speed.contenders import chosen
from benchmarks.speed.fairness import problems
from benchmarks.speed.prepare import Setting
from benchmarks.speed.presets import PRESETS, Shape, preset
from benchmarks.speed.rounds import Runner

GROWING = "qlora,peft_tuned"


def main() -> int:
    """Compare, write the report, and return 1 if a contender failed or trained differently from the others."""
    arguments = parser().parse_args()
    device = _device(arguments.device)
    shaped = preset(arguments.preset).change(
        sequences=arguments.sequences,
        length=arguments.length,
        documents=arguments.documents,
        micro_batch=arguments.micro_batch,
    )
    setting = Setting(
        preset=shaped,
        steps=arguments.warmup + arguments.steps,
        rank=arguments.rank,
        dtype=arguments.dtype,
        device=device,
        seed=arguments.seed,
        gsm8k=arguments.gsm8k and str(Path(arguments.gsm8k).resolve()),
        tokenizer=arguments.tokenizer and str(Path(arguments.tokenizer).resolve()),
        cache=str(Path(arguments.cache).expanduser().resolve()),
    )
    command = shlex.join(["python", "-m", "benchmarks.speed", *sys.argv[1:]])
    where = machine.describe(device, arguments.threads)
    path = None
    if arguments.out is not None:
        name = arguments.name or f"speed_{machine.slug(device)}_{where['date'][:7]}"
        path = Path(arguments.out) / name
    runner = Runner(
        arguments.threads,
        arguments.timeout,
        lambda line: print(line, file=sys.stderr, flush=True),
        None if path is None else path.with_name(f"{path.name}.answers.jsonl"),
    )
    comparison = runner.compare(
        setting,
        chosen(
            arguments.contenders, device, arguments.gsm8k is not None, Shape.of(shaped.config).experts > 0
        ),
        rounds=arguments.rounds,
        warmup=arguments.warmup,
    )
    grown = []
    if arguments.growth:
        dense = replace(setting, gsm8k=None, steps=3)
        grown = growth.measure(runner, dense, device, chosen(arguments.growth, device, real=False))

    text = report.markdown(comparison, where, command, grown)
    print(text)
    if path is not None:
        report.write(path, text, report.record(comparison, where, command, grown))
    wrong = problems(comparison.answers, comparison.prepared.dtype)
    failed = {name: why for name, why in wrong.items() if not comparison.answers[name][0].missing}
    for name, why in failed.items():
        print(f"FAILED {name}: {why}", file=sys.stderr)
    return 1 if failed else 0


def parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__.split("\n\n")[0])
    add = made.add_argument
    add("--preset", default="cpu", choices=PRESETS, help="architecture and tokens of a step")
    add("--contenders", help="comma-separated: `qlora`, `trl +ckpt`, a .py file; default: all")
    add("--rounds", type=int, default=3, help="fresh processes per contender")
    add("--warmup", type=int, default=3, help="steps that are not timed")
    add("--steps", type=int, default=5, help="steps that are timed")
    add("--sequences", type=int, help="dense sequences of a step")
    add("--length", type=int, help="tokens of a sequence or packed row")
    add("--rank", type=int, default=16, help="rank of the adapter")
    add("--gsm8k", help="JSON Lines with `question` and `answer`; default: dense random tokens")
    add("--tokenizer", help="folder of the tokenizer for --gsm8k; default: the bundled one")
    add("--documents", type=int, help="documents of a step, with --gsm8k")
    add("--micro-batch", type=int, help="documents of a padded micro-batch, with --gsm8k")
    add(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16"),
        help="dtype of all matrix products",
    )
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--threads", type=int, help="threads per process; default: torch's choice")
    add("--seed", type=int, default=0)
    add("--timeout", type=float, default=3600.0, help="seconds after which a contender is killed")
    add(
        "--growth",
        nargs="?",
        const=GROWING,
        help="also vary length, rank and model size, for these contenders",
    )
    add("--cache", default="~/.cache/qlora-speed", help="folder for the NF4 checkpoints")
    add("--out", help="folder for the report; default: only print")
    add("--name", help="name of the report's files; default: speed_<machine>_<yyyy-mm>")
    return made


def _device(asked: str) -> str:
    import torch

    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return asked


if __name__ == "__main__":
    sys.exit(main())
