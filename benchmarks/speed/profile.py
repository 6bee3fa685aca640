"""Where our own step spends its time, next to the least that its matrix products need.

    python -m benchmarks.speed.profile --preset cpu [--ckpt | --mlp]

The processor time and page faults of a step; then one under torch's profiler, its operators put into groups: products
of the base, of A and B, of the head; attention; dequantization; the largest of the rest by name. Prints a Markdown
table. (The profiler comes last: what it allocates breaks up the heap, and every step after it pays page faults.)
"""

import argparse
import resource
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.speed.contenders import OURS, Contender
from benchmarks.speed.contenders.qlora import Session
from benchmarks.speed.flops import step_flops
from benchmarks.speed.matmul import rate
from benchmarks.speed.prepare import Setting, prepare
from benchmarks.speed.presets import PRESETS, Shape
from benchmarks.speed.report import table
from benchmarks.speed.workload import Workload

STEPS = 4
SHOWN = 14


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--preset", default="cpu", choices=PRESETS)
    recompute = parser.add_mutually_exclusive_group()
    recompute.add_argument("--ckpt", action="store_true", help="recompute all layers")
    recompute.add_argument("--mlp", action="store_true", help="recompute the MLPs")
    parser.add_argument("--sequences", type=int)
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--cache", default="~/.cache/qlora-speed")
    arguments = parser.parse_args()
    preset = PRESETS[arguments.preset].change(sequences=arguments.sequences)
    cache = str(Path(arguments.cache).expanduser())
    setting = Setting(preset, steps=STEPS + 1, dtype=arguments.dtype, cache=cache)
    prepared = prepare(setting)
    flags = tuple(flag for flag in ("ckpt", "mlp") if getattr(arguments, flag))
    job = prepared.job(setting, flags=flags)
    session = Session(job)
    steps = Workload.load(job.workload).steps
    session.step(0, steps[0])
    used = [processor_time(session, number, steps[number]) for number in range(1, STEPS - 1)]

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if job.device == "cuda" else [])]
    with profile(activities=activities, record_shapes=True) as recorded:
        session.step(STEPS - 1, steps[STEPS - 1])
    groups = grouped(
        recorded.key_averages(group_by_input_shape=True), job.rank, Shape.of(preset.config).vocabulary
    )

    needed = step_flops(
        Shape.of(preset.config),
        job.rank,
        prepared.lengths[STEPS - 1],
        prepared.supervised[STEPS - 1],
        Contender(OURS, flags).recomputed,
    )
    product_rate = rate(job)["both"]
    total = sum(groups.values())
    rows = [[name, f"{ms:,.0f}", f"{ms / total:.1%}"] for name, ms in groups.most_common(SHOWN)]
    rest = sum(ms for _, ms in groups.most_common()[SHOWN:])
    print(table(["operators", "ms", "share"], [*rows, ["the rest", f"{rest:,.0f}", f"{rest / total:.1%}"]]))
    user, system, faults = (median(values) for values in zip(*used, strict=True))
    floor = needed.performed / product_rate * 1e3
    print(
        f"\nall {total:,.0f} ms; products alone, at {product_rate / 1e9:,.0f} GFLOP/s: {floor:,.0f} ms; "
        f"a step without the profiler: {user:.2f} s of processor time, {system:.2f} s of the system's, "
        f"{faults:,.0f} page faults"
    )


def grouped(events: Sequence[Any], rank: int, vocabulary: int) -> Counter[str]:
    """Milliseconds by group of operators."""
    found: Counter[str] = Counter()
    for event in events:
        time = event.self_device_time_total or event.self_cpu_time_total
        found[_group(event.key, event.input_shapes, rank, vocabulary)] += time / 1e3
    return found


def _group(operator: str, shapes: Sequence[Sequence[int]], rank: int, vocabulary: int) -> str:
    sizes = {size for shape in shapes for size in shape}
    if operator in ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm"):
        if vocabulary in sizes:
            return "products of the head"
        return "products with A and B" if rank in sizes else "products of the base"
    if "attention" in operator:
        return "attention, " + ("backward" if "backward" in operator else "forward")
    if operator.startswith(("bitsandbytes::", "_dequantize")):
        return "dequantization"
    if vocabulary in sizes:
        return "loss, elementwise"
    return operator.removeprefix("autograd::engine::evaluate_function: ")


def processor_time(session: Session, number: int, documents: Sequence[Any]) -> tuple[float, float, int]:
    """Seconds of the processors in our code and in the system's, and page faults, of one step."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    session.step(number, documents)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return (
        after.ru_utime - before.ru_utime,
        after.ru_stime - before.ru_stime,
        after.ru_minflt - before.ru_minflt,
    )


if __name__ == "__main__":
    main()
