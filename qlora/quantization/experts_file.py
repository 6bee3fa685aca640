"""Experts in NF4 in a file of their own, because no checkpoint of transformers can hold them.

    experts.safetensors    <name of the projection>.codes, .absmax, .scales, .offsets
                           metadata: for each projection its shape, block size and dtype as JSON

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

from qlora.quantization.expert_stack import PackedStack, as_parameter, expert_parameters
from qlora.quantization.transformers_loader import without_experts
from qlora.storage import tensor_file

FILE = "experts.safetensors"


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
        values = {
            "codes": stack.codes,
            "absmax": stack.absmax,
            "scales": stack.scales,
            "offsets": stack.offsets,
        }
        tensors |= {f"{name}.{part}": tensor for part, tensor in values.items() if tensor is not None}
        dtype = str(stack.dtype).removeprefix("torch.")
        settings[name] = {"shape": stack.shape, "block_size": stack.block_size, "dtype": dtype}
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
    with safe_open(path, framework="pt", device=str(device)) as file, without_experts():
        settings = json.loads(file.metadata()["projections"])

        def add(model: PreTrainedModel) -> PreTrainedModel:
            for name, own in settings.items():
                module, projection = get_module_from_name(model, name)
                module.register_parameter(projection, _parameter(file, name, own))
            return model

        yield add


def _parameter(file: Any, name: str, own: dict[str, Any]) -> nn.Parameter:
    present = set(file.keys())

    def part(suffix: str) -> Any:
        return file.get_tensor(f"{name}.{suffix}") if f"{name}.{suffix}" in present else None

    rows, columns = own["shape"]
    stack = PackedStack(
        codes=part("codes"),
        absmax=part("absmax"),
        scales=part("scales"),
        offsets=part("offsets"),
        shape=(rows, columns),
        block_size=own["block_size"],
        dtype=getattr(torch, own["dtype"]),
    )
    return as_parameter(stack)
