"""Tensors that stay in memory during the whole run, each with its memory category."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from qlora.adapter.methods import Course
from qlora.memory.live import ROUNDING
from qlora.memory.parts import PARTS
from qlora.optim import Optimizer
from qlora.optim.paged import is_paged
from qlora.quantization.expert_stack import ExpertStack
from qlora.quantization.nf4 import is_nf4, quant_state, statistics

Row = NDArray[np.int64]
"""[parts]"""
Rows = NDArray[np.int64]
"""[events, parts]"""

_COLUMN = {part: index for index, part in enumerate(PARTS)}
_KINDS = {
    "parameters": "adapters",
    "gradients": "gradients",
    "remainder": "optimizer_state",
    "moments": "optimizer_state",
}


def of_model(model: nn.Module) -> Iterator[tuple[Tensor, str]]:
    """Yield (tensor, part) for all frozen tensors of a model; NF4 codes and their statistics are separate parts."""
    for module in model.modules():
        if isinstance(module, nn.Linear) or is_nf4(module):
            if quant_state(module) is not None:
                yield module.weight, "base_nf4"
            yield from ((tensor, "quantization_statistics") for tensor in statistics(module))
        elif isinstance(module, ExpertStack) and module.packed:
            yield module.weight, "base_nf4"
            yield from ((tensor, "quantization_statistics") for tensor in module.statistics())
    for tensor in (*model.parameters(), *model.buffers()):
        if not tensor.requires_grad:
            yield tensor, "base_unquantized"


def of_layer(layers: Sequence[nn.Module], number: int) -> Iterator[tuple[Tensor, str]]:
    """Yield (tensor, part) for the frozen tensors of a layer alone, without those that other layers share with it."""
    others = [layer for other, layer in enumerate(layers) if other != number]
    shared = {tensor.untyped_storage()._cdata for layer in others for tensor, _ in of_model(layer)}
    for tensor, part in of_model(layers[number]):
        if tensor.untyped_storage()._cdata not in shared:
            yield tensor, part


def of_optimizer(optimizer: Optimizer) -> Iterator[tuple[Tensor, str]]:
    """Yield (tensor, part) for the trained parameters, their gradients and the optimizer state."""
    for kind, tensor in optimizer.tensors():
        yield tensor, "optimizer_state_paged" if is_paged(tensor) else _KINDS[kind]


def of_course(course: Course) -> Iterator[tuple[Tensor, str]]:
    """Yield (tensor, part) for the state of the adapter method during the run, such as AdaLoRA's averages."""
    for tensor in course.state().values():
        yield tensor, "optimizer_state"


def inventory(
    model: nn.Module, optimizer: Optimizer, course: Course | None = None
) -> list[tuple[Tensor, str]]:
    """Return (tensor, part) for all of them. A storage that several tensors share belongs to the first of them."""
    return [*of_optimizer(optimizer), *of_course(course or Course()), *of_model(model)]


def bytes_by_part(tensors: Iterable[tuple[Tensor, str]]) -> Row:
    """Return the bytes [parts] of the tensors' storages, each counted once."""
    row = np.zeros(len(PARTS), dtype=np.int64)
    seen = set()
    for tensor, part in tensors:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            row[_COLUMN[part]] += -(-storage.nbytes() // ROUNDING) * ROUNDING
    return row
