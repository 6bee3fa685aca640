"""Choice of how answers are computed, and the memory that this takes, before the first request."""

from typing import NamedTuple

from qlora.errors import OutOfMemoryError
from qlora.memory.inventory import of_model
from qlora.memory.measure import free_bytes
from qlora.recipe.sizes import GIB
from qlora.serving.kv_layout import CannotBatch, KVLayout, read_layout
from qlora.serving.models import Models
from qlora.serving.runners import Batched, OneAtATime, Runner
from qlora.serving.slots import SlotModel


class Start(NamedTuple):
    """A runner, and what to tell about it."""

    runner: Runner
    weight_bytes: int
    """bytes of the base and all adapters"""
    cache_bytes: int | None
    """bytes of the key-value cache, whether requests use it or not; None if the model makes its own"""
    why_single: str | None
    """reason why requests are answered one at a time; None if they share batches"""


def choose_runner(models: Models, parallel: int) -> Start:
    """Return the runner for a model: batches of up to `parallel` requests, if a check finds their answers right.

    Raises:
        OutOfMemoryError: the cache for this many requests does not fit into free memory.
    """
    weights = _weight_bytes(models)
    try:
        layout = read_layout(models.model, models.context)
        _check_memory(models, layout, parallel)
        model = SlotModel(models.model, layout, parallel, models.context)
        model.check()
    except CannotBatch as reason:
        return Start(OneAtATime(models.model, models.tokenizer, models.adapters), weights, None, str(reason))
    return Start(Batched(model, models.adapters), weights, model.cache_bytes, None)


def _weight_bytes(models: Models) -> int:
    """Return the bytes of the base and of all adapters, each storage once."""
    before = None if models.adapters is None else models.adapters.active
    storages: dict[int, int] = {}
    for adapter in (None,) if models.adapters is None else (None, *models.adapters.names):
        if models.adapters is not None:
            models.adapters.activate(adapter)
        tensors = (tensor for tensor, _ in of_model(models.model))
        for tensor in (*tensors, *models.model.parameters()):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    if models.adapters is not None:
        models.adapters.activate(before)
    return sum(storages.values())


def _check_memory(models: Models, layout: KVLayout, parallel: int) -> None:
    """Raise OutOfMemoryError if the cache does not fit into the memory that is free now."""
    free = free_bytes(next(models.model.parameters()).device)
    needed, each = layout.bytes(parallel, models.context), layout.bytes(1, models.context)
    if needed > free:
        fits = f"--parallel {free // each} fits, or lower --context" if free >= each else "lower --context"
        raise OutOfMemoryError(
            f"the cache of {parallel} requests with {models.context:,} tokens each takes {GIB.text(needed)}, and "
            f"{GIB.text(free)} are free; {fits}"
        )
