"""Profile a training step of qlora, and compare its time with that of its matrix products alone.

    python -m benchmarks.speed.profile --preset cpu [--ckpt | --mlp]

Measures the processor time and the page faults of a step. Then runs a step under torch's profiler and groups its
operators: matrix products of the base, of A and B, and of the head; attention; dequantization; the largest others by
name. On CUDA it groups kernels, whose products cannot be told apart. Prints a Markdown table. The profiler runs last,
because its allocations fragment the heap and cause page faults in later steps.
"""

import argparse
import resource
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch._C._autograd import DeviceType
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
    """Run the command line."""
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
    shape = Shape.of(preset.config)
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
        recorded.key_averages(group_by_input_shape=True),
        job.rank,
        shape.vocabulary,
        cuda=job.device == "cuda",
    )

    needed = step_flops(
        shape,
        job.rank,
        prepared.lengths[STEPS - 1],
        prepared.supervised[STEPS - 1],
        Contender(OURS, flags).recomputed,
    )
    product_rate = rate(job)["both"]
    total = sum(groups.values())
    rows = [[name, f"{ms:,.0f}", f"{ms / total:.1%}"] for name, ms in groups.most_common(SHOWN)]
    rest = sum(ms for _, ms in groups.most_common()[SHOWN:])
    print(table(["operators", "ms", "share"], [*rows, ["others", f"{rest:,.0f}", f"{rest / total:.1%}"]]))
    user, system, faults = (median(values) for values in zip(*used, strict=True))
    floor = needed.performed / product_rate * 1e3
    print(
        f"\ntotal: {total:,.0f} ms; matrix products alone, at {product_rate / 1e9:,.0f} GFLOP/s: {floor:,.0f} ms; "
        f"a step without the profiler: {user:.2f} s of user time, {system:.2f} s of system time, "
        f"{faults:,.0f} page faults"
    )


def grouped(events: Sequence[Any], rank: int, vocabulary: int, cuda: bool = False) -> Counter[str]:
    """Sum the milliseconds of the operators by group: on CUDA those of the kernels, each once.

    The profiler gives the time of a kernel to the operator that launched it, to a row of its own, and to the
    annotations around it. Only the rows of kernels are counted there; they have names but no shapes.
    """
    groups: Counter[str] = Counter()
    for event in events:
        if not cuda:
            groups[_group(event.key, event.input_shapes, rank, vocabulary)] += event.self_cpu_time_total / 1e3
        elif event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            groups[_kernel_group(event.key)] += event.self_device_time_total / 1e3
    return groups


def _kernel_group(kernel: str) -> str:
    """Group a kernel by its name."""
    name = kernel.lower()
    if any(part in name for part in ("flash", "fmha", "attention", "sdpa")):
        return "attention, " + ("backward" if "bwd" in name or "backward" in name else "forward")
    if any(part in name for part in ("gemm", "nvjet", "cutlass", "cublas", "xmma", "splitk")):
        return "matrix products"
    if "dequantize" in name:
        return "dequantization"
    return kernel.split("<")[0].split("(")[0]


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
    """Run one step; return its seconds of user and system time, and its page faults."""
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
