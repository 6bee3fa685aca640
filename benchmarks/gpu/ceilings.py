"""Describe the machine and measure its limits: the rates of a copy and of matrix products."""

from typing import Any

import torch

from benchmarks.gpu.lines import arguments, lines
from benchmarks.speed import machine
from benchmarks.speed.matmul import fastest


def main() -> None:
    """Run the command line."""
    options, write = arguments(__doc__), lines()
    device = torch.device(options.device)
    description: dict[str, Any] = machine.describe(options.device, None)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        description |= {
            "capability": list(torch.cuda.get_device_capability()),
            "driver_bytes_at_start": total - free,  # the CUDA context, if no one else uses the GPU
        }
    write(description)
    count = 2**20 if options.tiny else 2**31
    source = torch.zeros(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = fastest(lambda: target.copy_(source), device)
    write({"what": "copy", "bytes": 2 * count, "gb_per_s": 2 * count / seconds / 1e9})
    sizes = (
        {"square": (128,) * 3} if options.tiny else {"square": (8192,) * 3, "mlp of 8B": (4096, 4096, 14336)}
    )
    for name, (rows, inner, columns) in sizes.items():
        a = torch.randn(rows, inner, device=device).bfloat16()
        b = torch.randn(inner, columns, device=device).bfloat16()
        seconds = fastest(lambda a=a, b=b: a @ b, device)  # type: ignore[misc]
        rate = 2 * rows * inner * columns / seconds
        write({"what": "product", "shape": [rows, inner, columns], "name": name, "tflops": rate / 1e12})


if __name__ == "__main__":
    main()
