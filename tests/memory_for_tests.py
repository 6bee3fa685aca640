"""memory.json objects, as the forecast and the measurement write them, small enough to check by eye."""

import math
from collections.abc import Mapping
from typing import Any

from qlora.memory import rule_of_thumb
from qlora.memory.rule_of_thumb import Method

M, G = 10**6, 10**9
PHASES = {"forward": 0.35, "loss": 0.08, "backward": 0.45, "update": 0.05, "evaluation": 0.07}
SHAPES = {  # phase -> fraction of a part's peak at position 0..1 of the phase
    "saved_activations": {"forward": lambda x: x, "loss": lambda x: 1.0, "backward": lambda x: 1 - x},
    "working_set": {
        "forward": lambda x: 0.3 + 0.1 * math.sin(200 * x),
        "backward": lambda x: 0.7 + 0.3 * math.sin(200 * x),
        "evaluation": lambda x: 0.4,
    },
    "logits_and_loss": {
        "loss": lambda x: min(1.0, 3 * x),
        "backward": lambda x: 0.2 if x < 0.02 else 0.0,
        "evaluation": lambda x: 0.6 * x,
    },
    "dequantization": {
        "forward": lambda x: abs(math.sin(300 * x)),
        "backward": lambda x: abs(math.sin(300 * x)),
    },
}


def run_of(parts: Mapping[str, int], samples: int = 150, **more: Any) -> dict[str, Any]:
    """Return a forecast or measurement. Constant parts keep their size; the others rise to at most the given size."""
    starts, at = [], 0
    timeline: dict[str, list[int]] = {part: [] for part in parts}
    highest: dict[str, int] = {}
    for phase, share in PHASES.items():
        starts.append([at, phase])
        count = max(2, round(share * samples))
        for i in range(count):
            for part, size in parts.items():
                level = SHAPES[part].get(phase, lambda x: 0.0)(i / (count - 1)) if part in SHAPES else 1.0
                timeline[part].append(int(level * size))
        totals = [sum(values) for values in zip(*timeline.values(), strict=True)]
        highest[phase] = max(totals[at:])
        at = len(totals)
    top = totals.index(max(totals))
    peak = next(phase for begin, phase in reversed(starts) if begin <= top)
    return {
        "total_bytes": totals[top],
        "parts": {part: values[top] for part, values in timeline.items()},
        "peak": peak,
        "phases": highest,
        "timeline": {"phases": starts, "parts": timeline},
        "allocated_bytes": totals[top] - parts.get("device_context", 0),
        "reserved_bytes": None,
        **more,
    }


def memory_of(
    parts: Mapping[str, int],
    *,
    method: Method = "lora",
    parameters: int,
    adapter_parameters: int,
    device: Mapping[str, Any],
    off: float | None = None,
    samples: int = 150,
    **workload: Any,
) -> dict[str, Any]:
    """Return a memory.json object. `off` is the measurement's relative excess over the forecast; None: not measured."""
    forecast = run_of(parts, samples)
    measured = None
    if off is not None:
        found = {part: int(size * (1 + off)) for part, size in parts.items()}
        measured = run_of(
            found, samples, what="live tensor bytes of 20 steps", resident_bytes=3 * G, driver_bytes=None
        )
    return {
        "version": 1,
        "device": dict(device),
        "workload": {
            "micro_batch_size": 4, "row_tokens": 512, "packing": True, "supervised": 1490, "checkpointed_layers": 32,
            "layers": 32, "loss_chunk": 1024, "basis": "the longest rows of the data", **workload,
        },
        "documents": rule_of_thumb.as_json(method, parameters, adapter_parameters, forecast, measured),
        "forecast": forecast,
        "measured": measured,
    }  # fmt: skip


GPU = {"kind": "cuda", "name": "NVIDIA H100 80GB HBM3", "capacity_bytes": 79 * 2**30}
CPU = {"kind": "cpu", "name": "CPU", "capacity_bytes": None}


def llama_7b(off: float | None = 0.008, capacity_bytes: int | None = 79 * 2**30) -> dict[str, Any]:
    """Return the memory of a 7B LoRA run on a GPU."""
    parts = {
        "base_nf4": 3238 * M, "quantization_statistics": 103 * M, "base_unquantized": 525 * M, "adapters": 320 * M,
        "gradients": 320 * M, "optimizer_state": 1919 * M, "saved_activations": 537 * M, "working_set": 800 * M,
        "logits_and_loss": 420 * M, "dequantization": 90 * M, "allocator_slack": 120 * M, "device_context": 520 * M,
    }  # fmt: skip
    return memory_of(
        parts, parameters=6_738_415_616, adapter_parameters=159_907_840, off=off,
        device={**GPU, "capacity_bytes": capacity_bytes},
    )  # fmt: skip


def tiny(off: float | None = None) -> dict[str, Any]:
    """Return the memory of a run of the bundled base on a CPU."""
    parts = {
        "base_nf4": 16 * M // 10, "quantization_statistics": 90_000, "base_unquantized": 21 * M // 10,
        "adapters": 680_000, "gradients": 680_000, "optimizer_state": 41 * M // 10, "saved_activations": 120 * M,
        "working_set": 25 * M, "logits_and_loss": 33 * M, "dequantization": 700_000,
    }  # fmt: skip
    return memory_of(
        parts, parameters=3_700_000, adapter_parameters=340_000, device=CPU, off=off, micro_batch_size=8,
        row_tokens=64, packing=False, checkpointed_layers=0, layers=4, loss_chunk=512,
    )  # fmt: skip


def whole_model() -> dict[str, Any]:
    """Return the memory of full fine-tuning: a 1.1B model that just fits on a GPU."""
    n = 1_100_000_000
    parts = {
        "adapters": 2 * n, "gradients": 2 * n, "optimizer_state": 12 * n, "saved_activations": 900 * M,
        "working_set": 700 * M, "logits_and_loss": 420 * M, "allocator_slack": 300 * M, "device_context": 520 * M,
    }  # fmt: skip
    return memory_of(
        parts, method="full", parameters=n, adapter_parameters=0, off=-0.004,
        device={"kind": "cuda", "name": "NVIDIA RTX 4090", "capacity_bytes": 24 * 2**30}, layers=22,
        checkpointed_layers=10,
    )  # fmt: skip
