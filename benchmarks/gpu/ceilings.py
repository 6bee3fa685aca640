"""Describe the machine and measure its limits: the rates of a copy and of matrix products."""

import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.lines import arguments, lines
from benchmarks.speed import machine


def main() -> None:
    """Run the command line."""
    options, write = arguments(__doc__), lines()
    cuda = options.device == "cuda"
    description: dict[str, Any] = machine.describe(options.device, None)
    if cuda:
        free, total = torch.cuda.mem_get_info()
        description |= {
            "capability": list(torch.cuda.get_device_capability()),
            "driver_bytes_at_start": total - free,  # the CUDA context, if no one else uses the GPU
        }
    write(description)
    count = 2**20 if options.tiny else 2**31
    source = torch.zeros(count, dtype=torch.uint8, device=options.device)
    target = torch.empty_like(source)
    seconds = fastest(lambda: target.copy_(source), cuda)
    write({"what": "copy", "bytes": 2 * count, "gb_per_s": 2 * count / seconds / 1e9})
    sizes = (
        {"square": (128,) * 3} if options.tiny else {"square": (8192,) * 3, "mlp of 8B": (4096, 4096, 14336)}
    )
    for name, (rows, inner, columns) in sizes.items():
        a = torch.randn(rows, inner, device=options.device).bfloat16()
        b = torch.randn(inner, columns, device=options.device).bfloat16()
        seconds = fastest(lambda a=a, b=b: a @ b, cuda)  # type: ignore[misc]
        rate = 2 * rows * inner * columns / seconds
        write({"what": "product", "shape": [rows, inner, columns], "name": name, "tflops": rate / 1e12})


def fastest(work: Callable[[], object], cuda: bool, groups: int = 5, calls: int = 10) -> float:
    """Return the seconds of one call: the fastest of some groups, after a warm-up."""
    best = float("inf")
    for _ in range(groups + 1):
        _wait(cuda)
        start = time.perf_counter()
        for _ in range(calls):
            work()
        _wait(cuda)
        best = min(best, (time.perf_counter() - start) / calls)
    return best


def _wait(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
