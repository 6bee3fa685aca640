"""Experts and routers of a checkpoint that is in NF4 already, which transformers cannot read.

Its linear layers are in NF4, and transformers reads them. Its experts are in 16 bits, as transformers 5 writes them, or
each matrix of an expert is in NF4, as transformers 4 wrote it. Here they are read projection by projection: those in
NF4 as they are, those in 16 bits are quantized with the checkpoint's settings. transformers 4 also put routers in NF4
that are no linear layers in transformers 5; they are dequantized.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.bitsandbytes import Bnb4bitDeserialize
from transformers.utils import logging

from qlora.quantization import nf4
from qlora.quantization.expert_stack import as_parameter
from qlora.quantization.stored_parameters import StoredParameters
from qlora.quantization.transformers_loader import (
    add_left_out,
    leaving_out,
    nf4_experts,
    nf4_layers,
    require_whole,
)
from qlora.storage.safetensors_files import ShardReader


@contextmanager
def read_apart(
    folder: Path,
    config: Any,
    *,
    block_size: int,
    double_quant: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[Callable[[PreTrainedModel], PreTrainedModel]]:
    """Let `from_pretrained` leave out the experts and routers that it cannot read; yield a function that adds them.

    The routers are in fp32 until `cast_dense` casts them with all that is not quantized.

    Args:
        folder: the files.
        config: the checkpoint's own quantization config.
        block_size: number of weights that share an absmax, for experts in 16 bits.
        double_quant: True if the absmax of experts in 16 bits are quantized too.
        dtype: dtype to which experts in 16 bits are cast before they are quantized.
        device: device of the model.

    Raises:
        ModelError: the yielded function cannot read the files, or those that transformers read are damaged.
    """
    reader = ShardReader(folder)
    experts: list[str] = []
    dense: list[str] = []
    files: Any = None

    def choose(model: PreTrainedModel) -> list[str]:
        nonlocal files
        experts[:] = nf4_experts(model, config)
        others = _dense_matrices(model, config, experts)
        files = StoredParameters(model, {*experts, *others}, reader)
        dense[:] = [name for name in others if files.in_nf4(name) and len(files.keys(name)) == 1]
        return [*experts, *dense]

    def add(model: PreTrainedModel) -> PreTrainedModel:
        require_whole(model)
        files.require(experts)
        for name in logging.tqdm(experts, desc="Loading weights") if experts else ():
            packed = files.quantized(name, block_size, double_quant, dtype, device)
            add_left_out(model, name, as_parameter(packed))
        for name in dense:
            (weight,) = files.packed.read(files.keys(name))
            values = nf4.dequantize(weight, weight.quant_state, torch.float32)
            add_left_out(model, name, nn.Parameter(values.to(device)))
        # transformers undoes its conversions when it saves a model, and cannot undo this one
        model._weight_conversions = [
            change
            for change in model._weight_conversions
            if not any(isinstance(step, Bnb4bitDeserialize) for step in getattr(change, "operations", ()))
        ]
        return model

    with leaving_out(choose):
        yield add


def experts_in_16_bits(model: PreTrainedModel, config: Any, reader: ShardReader) -> list[str]:
    """Return the names of the tensors in the files that hold experts in 16 bits, which `read_apart` quantizes.

    Args:
        model: the unquantized model on the meta device.
        config: the checkpoint's own quantization config.
        reader: the files.
    """
    experts = nf4_experts(model, config)
    files = StoredParameters(model, experts, reader)
    return [key for name in experts for key in files.keys(name) if key not in files.packed]


def _dense_matrices(model: PreTrainedModel, config: Any, experts: list[str]) -> list[str]:
    """Return the names of the matrices that are not in NF4 in the loaded model."""
    packed = {f"{name}.weight" for name in nf4_layers(model, config)} | set(experts)
    return [
        name for name, parameter in model.named_parameters() if parameter.ndim == 2 and name not in packed
    ]
