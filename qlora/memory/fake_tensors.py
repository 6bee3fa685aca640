"""What fake tensors cannot tell, said in their stead: values that transformers asks for, shapes of some operations."""

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
    """The batch with each tensor made fake."""
    positions = batch.position_ids
    return replace(
        batch,
        input_ids=fake(batch.input_ids),
        labels=fake(batch.labels),
        position_ids=None if positions is None else fake(positions),
    )


def as_packed(batch: Batch) -> AbstractContextManager[None]:
    """Tell transformers whether rows hold several documents: it reads that from values, which fake tensors lack.

    Where none does it needs no attention mask, and takes another way through attention.
    """
    positions = batch.position_ids
    with real_values():
        return rows_packed(positions is not None and bool((positions.diff(dim=-1) != 1).any()))


def keep_all_layers(model: nn.Module) -> None:
    """No layer is dropped at random: some OPTs of transformers draw a number for each, and ask it."""

    def keep(module: nn.Module, _: Any) -> None:
        module.training = False  # of this module alone: its layers go on training

    for module in model.modules():
        if hasattr(module, "layerdrop"):
            module.register_forward_pre_hook(keep)


class MetaKernels(TorchDispatchMode):
    """Shapes of operations for which torch can tell them of some dtypes only."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the guard costs more than the mode

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
            return _grouped_mm(*args)
        return func(*args, **(kwargs or {}))


def _grouped_mm(a: Tensor, b: Tensor, offsets: Tensor, *_: Any) -> Tensor:
    """The products of a mixture's experts: rows [N, K] by [E, K, M], or, for the weights, [K, N] by [N, M]."""
    if b.ndim == 3:
        return a.new_empty(a.shape[0], b.shape[2])
    return a.new_empty(offsets.shape[0], a.shape[0], b.shape[1])
