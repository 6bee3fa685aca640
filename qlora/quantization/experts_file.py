"""Experts in NF4 in a file of their own, because no checkpoint of transformers can hold them.

    experts.safetensors    <name of the projection>.codes, .absmax, .scales, .offsets, .code, .table
                           metadata: for each projection its shape, block size, dtype and parts as JSON

The file belongs to a checkpoint of transformers with everything else, as in the cache of quantized bases.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.quantizers_utils import get_module_from_name

from qlora.quantization.expert_stack import STATISTICS, PackedStack, as_parameter, expert_parameters
from qlora.quantization.transformers_loader import add_left_out, leaving_out
from qlora.storage import tensor_file

FILE = "experts.safetensors"

PARTS = ("codes", *STATISTICS)


@contextmanager
def saved(model: PreTrainedModel, folder: Path) -> Iterator[None]:
    """Write the packed experts of a model that was just read; within the context, the model is without them.

    Raises:
        OSError, SafetensorError: the file cannot be written.
    """
    packed: dict[str, PackedStack] = {
        name: parameter.packed for name, parameter in expert_parameters(model) if hasattr(parameter, "packed")
    }
    if not packed:
        yield
        return
    tensors: dict[str, Tensor] = {}
    settings = {}
    for name, stack in packed.items():
        tensors |= {f"{name}.{part}": tensor for part, tensor in stack.tensors().items()}
        settings[name] = {
            "shape": stack.shape,
            "block_size": stack.block_size,
            "dtype": str(stack.dtype).removeprefix("torch."),
            "parts": stack.parts,
        }
    tensor_file.write(folder / FILE, tensors, {"projections": json.dumps(settings)})
    parameters = {name: model.get_parameter(name) for name in packed}
    try:
        for name in parameters:
            module, own = get_module_from_name(model, name)
            del module._parameters[own]
        yield
    finally:
        for name, parameter in parameters.items():
            module, own = get_module_from_name(model, name)
            module.register_parameter(own, parameter)


@contextmanager
def loading(folder: Path, device: torch.device) -> Iterator[Callable[[PreTrainedModel], PreTrainedModel]]:
    """Let `from_pretrained` leave out the experts that a file in `folder` holds; yield a function that adds them.

    Without such a file, nothing is left out or added.
    """
    path = folder / FILE
    if not path.is_file():
        yield lambda model: model
        return
    with safe_open(path, framework="pt", device=str(device)) as file:
        settings = json.loads(file.metadata()["projections"])

        def add(model: PreTrainedModel) -> PreTrainedModel:
            for name, own in settings.items():
                add_left_out(model, name, _parameter(file, name, own))
            return model

        with leaving_out(lambda model: settings):
            yield add


def _parameter(file: Any, name: str, own: dict[str, Any]) -> nn.Parameter:
    present = set(file.keys())
    tensors: Any = {
        part: file.get_tensor(f"{name}.{part}") if f"{name}.{part}" in present else None for part in PARTS
    }
    rows, columns = own["shape"]
    stack = PackedStack(
        **tensors,
        shape=(rows, columns),
        block_size=own["block_size"],
        dtype=getattr(torch, own["dtype"]),
        parts=own["parts"],
    )
    return as_parameter(stack)
