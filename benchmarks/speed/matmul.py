"""Measure the rate of matrix products in the shapes of the base, the upper limit for a step.

    python -m benchmarks.speed.matmul JOB.json

Times the forward pass (x W^T) and the input gradient (g W) of every linear layer of a decoder layer, over all tokens of
a micro-batch, in the job's dtype, with dense weights. One expert of a projection, with its share of the tokens, is
timed for all. Takes the best of several repeats. Prints one JSON object: operations per second.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.speed.job import Job
from benchmarks.speed.presets import Shape
from benchmarks.speed.workload import Workload


def rate(job: Job, repeats: int = 5) -> dict[str, float]:
    """Return operations per second: forward, input gradient, and both together."""
    shape = Shape.of(json.loads((Path(job.base) / "config.json").read_text()))
    step = Workload.load(job.workload).steps[0]
    tokens = sum(len(document.input_ids) for document in step) * job.micro_batch // len(step)
    dtype, device = getattr(torch, job.dtype), torch.device(job.device)
    operations = {"forward": 0.0, "input_gradient": 0.0}
    seconds = dict(operations)
    for linear in shape.linears():
        inputs, outputs, count = linear.inputs, linear.outputs, linear.experts
        rows = max(1, tokens * linear.active // count)
        weight = torch.randn(outputs, inputs, device=device).to(dtype)
        x = torch.randn(rows, inputs, device=device).to(dtype)
        gradient = torch.randn(rows, outputs, device=device).to(dtype)
        for kind, product in {
            "forward": lambda x=x, weight=weight: x @ weight.T,
            "input_gradient": lambda gradient=gradient, weight=weight: gradient @ weight,
        }.items():
            operations[kind] += 2.0 * rows * inputs * outputs * count
            seconds[kind] += fastest(product, device, repeats) * count
    both = sum(operations.values()) / sum(seconds.values())
    return {"both": both} | {kind: operations[kind] / seconds[kind] for kind in operations}


def fastest(work: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Return the minimum seconds of one call; on CUDA calls are timed in groups of ten."""
    calls = 10 if device.type == "cuda" else 1
    best = float("inf")
    for _ in range(repeats + 1):  # the first repeat warms up
        _wait(device)
        start = time.perf_counter()
        for _ in range(calls):
            work()
        _wait(device)
        best = min(best, (time.perf_counter() - start) / calls)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    print(json.dumps(rate(Job.read(sys.argv[1]))))
