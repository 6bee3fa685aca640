"""Content of memory.json: rule of thumb, forecast and measurement of one run."""

from collections.abc import Mapping
from typing import Any

import torch

from qlora.memory import rule_of_thumb
from qlora.memory.architecture import dtype_on
from qlora.memory.forecast import Forecast
from qlora.memory.workload import Workload
from qlora.recipe import Recipe
from qlora.runtime.device import device_name


def account(
    recipe: Recipe,
    workload: Workload,
    forecast: Forecast,
    *,
    cuda: bool,
    capacity_bytes: int | None = None,
    measured: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the content of memory.json as plain values, all sizes in bytes.

    Args:
        recipe: the run's recipe.
        workload: the largest batches of the run.
        forecast: their forecast.
        cuda: True for a GPU, False for the CPU.
        capacity_bytes: memory of the GPU, if known.
        measured: the result of `Watch.measured`, if the run was measured.
    """
    expected = as_json(forecast)
    frozen_base = recipe.adapter.facts.frozen_base
    return {
        "version": 1,
        "device": {
            "kind": "cuda" if cuda else "cpu",
            "name": _device_name(cuda),
            "capacity_bytes": capacity_bytes,
        },
        "workload": {
            "micro_batch_size": forecast.batch.input_ids.shape[0],
            "row_tokens": forecast.batch.input_ids.shape[1],
            "packing": recipe.data.packing,
            "supervised": forecast.batch.supervised,
            "checkpointed_layers": forecast.checkpointed_layers,
            "checkpointed_mlps": forecast.checkpointed_mlps,
            "layers": forecast.layers,
            "loss_chunk": forecast.loss_chunk,
            "basis": workload.basis,
            "compute_dtype": str(dtype_on(recipe, cuda)).removeprefix("torch."),
        },
        "documents": rule_of_thumb.as_json(
            "lora" if frozen_base else "full",
            forecast.parameters,
            forecast.trained_parameters if frozen_base else 0,
            expected,
            measured,
        ),
        "forecast": expected,
        "measured": None if measured is None else dict(measured),
    }


def as_json(forecast: Forecast) -> dict[str, Any]:
    """Return the object `forecast` of memory.json."""
    phase, parts = forecast.trace.peak()
    not_allocated = parts["allocator_slack"] + parts["device_context"] + parts["optimizer_state_paged"]
    total = sum(parts.values())
    return {
        "total_bytes": total,
        "parts": {part: size for part, size in parts.items() if size},
        "peak": phase,
        "phases": forecast.trace.phases(),
        "timeline": forecast.trace.timeline(),
        "allocated_bytes": total - not_allocated,
        "reserved_bytes": total - not_allocated + parts["allocator_slack"],
        "host_bytes": forecast.host_bytes,
    }


def _device_name(cuda: bool) -> str:
    if not cuda:
        return "CPU"
    return device_name(torch.device("cuda")) if torch.cuda.is_available() else "a GPU"
