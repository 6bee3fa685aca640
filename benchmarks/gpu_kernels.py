"""Time each Triton kernel against plain torch on a GPU, at the shapes of Llama 3.1 8B.

    python benchmarks/gpu_kernels.py [--tokens 4096] [--json FILE]

Prints one line per pass: the time of both forms, and the rate at which the kernel reads and writes memory, each tensor
counted once. A kernel that gains nothing should be deleted.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora.kernels import FusedOp, cross_entropy, gate, norm, rotary
from qlora.quantization import nf4

HIDDEN, INTERMEDIATE, HEADS, HEAD_DIM, VOCABULARY, CHUNK = 4096, 14336, 32, 128, 128256, 1024
REPEATS = 30


def passes(tokens: int) -> dict[FusedOp, tuple[Any, ...]]:
    """Return every pass with its arguments, for one layer or one chunk of the loss."""

    def numbers(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, device="cuda", dtype=dtype)

    wide = [numbers(tokens, INTERMEDIATE) for _ in range(4)]
    rows, weight = [numbers(tokens, HIDDEN) for _ in range(3)], numbers(HIDDEN)
    heads, angles = numbers(1, tokens, HEADS, HEAD_DIM), numbers(1, tokens, HEAD_DIM)
    logits = numbers(CHUNK, VOCABULARY, dtype=torch.float32)
    targets = torch.randint(VOCABULARY, (CHUNK,), device="cuda")
    packed = nf4.synthetic_weight(INTERMEDIATE, HIDDEN, device="cuda")
    state = packed.quant_state
    inner = state.state2
    return {
        gate.SILU_PRODUCT: tuple(wide[:3]),
        gate.SILU_GRADIENTS: tuple(wide),
        norm.NORMALIZE: (rows[0], weight, 1e-5, rows[1]),
        norm.NORMALIZE_GRADIENT: (rows[0], rows[1], weight, 1e-5, rows[2]),
        rotary.ROTATE: (heads, angles, angles, 1, torch.empty_like(heads)),
        cross_entropy.LOSS: (
            logits, targets, None, 1.0, logits.to(torch.bfloat16), torch.empty(CHUNK, device="cuda")
        ),
        nf4.DEQUANTIZE: (
            torch.empty(INTERMEDIATE, HIDDEN, device="cuda", dtype=torch.bfloat16), packed.detach().view(-1),
            state.absmax, inner.absmax, inner.code, state.offset, state.code, state.blocksize, inner.blocksize,
        ),
    }  # fmt: skip


def milliseconds(work: Callable[[], None]) -> float:
    """Return the median time of `work` over many runs, after a warm-up."""
    times = []
    for number in range(REPEATS + 5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        if number >= 5:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def main() -> None:
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
    print(f"{'pass':20}{'torch, ms':>12}{'kernel, ms':>12}{'gain':>8}{'GB/s':>8}")
    for work, arguments in passes(options.tokens).items():
        plain = milliseconds(lambda: work.plain(*arguments))  # noqa: B023 - called at once
        kernel = milliseconds(lambda: work.in_triton(*arguments))  # noqa: B023
        touched = sum(x.nbytes for x in arguments if isinstance(x, Tensor))
        rate = touched / kernel / 1e6
        print(f"{work.kernel:20}{plain:12.3f}{kernel:12.3f}{plain / kernel:8.2f}{rate:8.0f}")
        records.append({"pass": work.kernel, "plain_ms": plain, "kernel_ms": kernel, "gb_per_s": rate})
    if options.json:
        record = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "passes": records}
        options.json.write_text(json.dumps(record | {"tokens": options.tokens}, indent=2) + "\n")


if __name__ == "__main__":
    main()
