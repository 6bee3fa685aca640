"""Substitutes for what fake tensors lack: values that transformers reads, and shapes of some operations."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qlora.data import Batch
from qlora.runtime.fake import real_values
from qlora.runtime.patches import rows_packed


def faked(batch: Batch, fake: Callable[[Tensor], Tensor]) -> Batch:
    """Return the batch with fake tensors."""
    positions = batch.position_ids
    return replace(
        batch,
        input_ids=fake(batch.input_ids),
        labels=fake(batch.labels),
        position_ids=None if positions is None else fake(positions),
    )


def as_packed(batch: Batch) -> AbstractContextManager[None]:
    """Tell transformers whether rows contain several documents; it would read values, which fake tensors lack.

    If no row contains several, transformers makes no attention mask and uses another attention function.
    """
    positions = batch.position_ids
    with real_values():
        return rows_packed(positions is not None and bool((positions.diff(dim=-1) != 1).any()))


def keep_all_layers(model: nn.Module) -> None:
    """Switch off LayerDrop: transformers' OPT draws a random number for each layer and reads its value."""

    def keep(module: nn.Module, _: Any) -> None:
        module.training = False  # only this module: its layers keep their training mode

    for module in model.modules():
        if hasattr(module, "layerdrop"):
            module.register_forward_pre_hook(keep)


class MetaKernels(TorchDispatchMode):
    """Output shapes of operations whose meta kernels support only some dtypes."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the check costs more than the mode

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
            return _grouped_mm(*args)
        return func(*args, **(kwargs or {}))


def _grouped_mm(a: Tensor, b: Tensor, offsets: Tensor, *_: Any) -> Tensor:
    """Return an empty result of a grouped product: [N, K] by [E, K, M], or, for weight gradients, [K, N] by [N, M]."""
    if b.ndim == 3:
        return a.new_empty(a.shape[0], b.shape[2])
    return a.new_empty(offsets.shape[0], a.shape[0], b.shape[1])
