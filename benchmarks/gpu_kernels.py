"""Time each Triton kernel against plain torch on a GPU, at the shapes of Llama 3.1 8B.

    python benchmarks/gpu_kernels.py [--tokens 4096] [--json FILE]

Prints one line per pass: the kernel's state after its check, the time of both forms, and the rate at which the kernel
reads and writes memory, each tensor counted once. Before every timed launch Triton's `do_bench` empties the L2 cache,
and the GPU has work queued, so neither the cache nor the host is measured. A kernel that gains nothing should be
deleted. Exits with 1 if a kernel fell back to plain torch.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora.kernels import FusedOp, cross_entropy, gate, grouped, norm, rotary
from qlora.quantization import nf4

REPEATS = 3
"""timed calls on a CPU, where `do_bench` does not work"""


@dataclass(frozen=True)
class Shapes:
    """Sizes of a model and of its micro-batch."""

    tokens: int = 4096
    hidden: int = 4096
    intermediate: int = 14336
    heads: int = 32
    head_dim: int = 128
    vocabulary: int = 128256
    chunk: int = 1024
    """tokens of the loss at a time"""
    experts: int = 10
    """experts of a mixture whose products are computed at once"""
    expert: int = 768
    """features between the products of an expert"""
    rank: int = 8
    """of an expert's adapter"""


TINY = Shapes(16, 64, 128, 2, 32, 300, 8, 3, 24, 4)


def passes(shapes: Shapes, device: str) -> dict[FusedOp, tuple[Any, ...]]:
    """Return every pass with its arguments, for one layer or one chunk of the loss."""

    def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    wide = [random(shapes.tokens, shapes.intermediate) for _ in range(4)]
    rows, weight = [random(shapes.tokens, shapes.hidden) for _ in range(3)], random(shapes.hidden)
    heads = random(1, shapes.tokens, shapes.heads, shapes.head_dim)
    angles = random(1, shapes.tokens, shapes.head_dim)
    logits = random(shapes.chunk, shapes.vocabulary, dtype=torch.float32)
    targets = torch.randint(shapes.vocabulary, (shapes.chunk,), device=device)
    packed = nf4.synthetic_weight(shapes.intermediate, shapes.hidden, device=device)
    state = packed.quant_state
    inner = state.state2
    ends = tuple(shapes.tokens * (number + 1) // shapes.experts for number in range(shapes.experts))
    spans = grouped.Spans(ends, torch.tensor(ends, device=device))
    inner_rows, low = random(shapes.tokens, 2 * shapes.expert), random(shapes.tokens, shapes.rank)
    dense = torch.empty(shapes.intermediate, shapes.hidden, device=device, dtype=torch.bfloat16)
    return {
        gate.SILU_PRODUCT: tuple(wide[:3]),
        gate.SILU_GRADIENTS: tuple(wide),
        norm.NORMALIZE: (rows[0], weight, 1e-5, rows[1]),
        norm.NORMALIZE_GRADIENT: (rows[0], rows[1], weight, 1e-5, rows[2]),
        rotary.ROTATE: (heads, angles, angles, 1, torch.empty_like(heads), False),
        cross_entropy.LOSS: (
            logits, targets, None, 1.0, logits.to(torch.bfloat16), torch.empty(shapes.chunk, device=device)
        ),
        grouped.PRODUCT: (
            rows[0], random(shapes.experts, 2 * shapes.expert, shapes.hidden).transpose(1, 2), spans, inner_rows,
            False, 1.0,
        ),
        grouped.OUTER: (
            low, rows[0], spans, random(shapes.experts, shapes.rank, shapes.hidden), 1.0
        ),
        nf4.DEQUANTIZE: (
            dense, packed.detach().view(-1), state.absmax, inner.absmax, inner.code, state.offset, state.code,
            state.blocksize, inner.blocksize,
        ),
    }  # fmt: skip


def milliseconds(work: Callable[[], None], device: str) -> float:
    """Return the median time of `work`; on a GPU with an empty cache and a busy queue."""
    if device == "cuda":
        from triton.testing import do_bench

        return float(do_bench(work, warmup=10, rep=60, return_mode="median"))
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def measured(work: FusedOp, arguments: tuple[Any, ...], device: str) -> dict[str, Any]:
    """Check a pass on the device, time its two forms, and return the result.

    `state` is `runs`, or the reason for which the kernel falls back to plain torch.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32  # the interpreter truncates to bfloat16
    record: dict[str, Any] = {"pass": work.kernel}
    if device == "cuda" or work is not nf4.DEQUANTIZE:  # whose plain form bitsandbytes has for GPUs alone
        try:
            record["state"] = work.difference(torch.device(device), dtype) or "runs"
        except Exception as error:  # noqa: BLE001 - of the compiler or the driver: it is the result
            return record | {"state": f"{type(error).__name__}: {error}".splitlines()[0]}
        record["plain_ms"] = milliseconds(lambda: work.plain(*arguments), device)
    kernel = milliseconds(lambda: work.in_triton(*arguments), device)
    touched = sum(x.nbytes for x in arguments if isinstance(x, Tensor))
    return record | {"kernel_ms": kernel, "gb_per_s": touched / kernel / 1e6}


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(
            "benchmarks/gpu_kernels.py needs a GPU: on a CPU only the plain forms run, so there is nothing to compare"
        )
    records = []
    print(f"{'pass':20}{'torch, ms':>12}{'kernel, ms':>12}{'gain':>8}{'GB/s':>8}  state")
    for work, arguments in passes(Shapes(tokens=options.tokens), "cuda").items():
        record = measured(work, arguments, "cuda")
        records.append(record)
        numbers = ""
        if "kernel_ms" in record:
            plain, kernel = record["plain_ms"], record["kernel_ms"]
            numbers = f"{plain:12.3f}{kernel:12.3f}{plain / kernel:8.2f}{record['gb_per_s']:8.0f}"
        print(f"{work.kernel:20}{numbers}  {record['state']}", flush=True)
        if options.json:  # after every pass: a run that is cut short keeps its results
            content = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "passes": records}
            options.json.write_text(json.dumps(content | {"tokens": options.tokens}, indent=2) + "\n")
    return int(any(record["state"] != "runs" for record in records))


if __name__ == "__main__":
    sys.exit(main())
