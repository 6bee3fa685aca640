"""Bases without a checkpoint, with random weights or with random NF4 codes made directly on the device."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.quantizers_utils import get_module_from_name

from qlora.adapter.targets import is_conv1d, is_linear
from qlora.model.prequantized import has_packed_experts
from qlora.quantization import nf4
from qlora.quantization.expert_stack import PackedStack, as_parameter, quantize, synthetic_stack
from qlora.quantization.transformers_loader import OnWeight, nf4_experts, nf4_layers
from qlora.recipe import Base
from qlora.runtime.patches import parameters_on_meta


def random(
    base: Base, config: Any, device: torch.device, dtype: torch.dtype, on_weight: OnWeight | None = None
) -> PreTrainedModel:
    """Initialise the architecture from torch's seed for training from scratch; quantize it if the recipe does so."""
    settings: dict[str, Any] = {"block_size": base.block_size, "double_quant": base.double_quant}

    def quantized(name: str, weight: Tensor) -> nf4.Params4bit:
        kept = weight if on_weight is None else on_weight(name, weight, partial(nf4.rounded, **settings))
        return nf4.quantize(kept, **settings)

    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=base.trust_remote_code
        )
    if base.quantization == "nf4":
        _replace_linears(model, quantized)
        _replace_experts(model, lambda weight, _: quantize(weight, **settings))
    return model


def synthetic(
    base: Base, config: Any, device: torch.device, dtype: torch.dtype, on_weight: OnWeight | None = None
) -> PreTrainedModel:
    """Build the architecture with random values, directly in their final dtype; fake tensors work too.

    on_weight: not called, because there is no 16-bit weight.
    """
    with parameters_on_meta():
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=base.trust_remote_code
        )
    generator = torch.Generator(device).manual_seed(torch.initial_seed())
    std = getattr(config.get_text_config(), "initializer_range", None) or 0.02
    if base.quantization == "nf4":
        _replace_linears(
            model,
            lambda name, weight: nf4.synthetic_weight(
                *weight.shape,
                block_size=base.block_size,
                double_quant=base.double_quant,
                device=device,
                generator=generator,
                std=std,
            ),
            device=device,
        )
        _replace_experts(
            model,
            lambda weight, parts: synthetic_stack(
                weight.shape,
                parts=parts,
                block_size=base.block_size,
                double_quant=base.double_quant,
                device=device,
                generator=generator,
                std=std,
            ),
        )
    _materialise(model, device, dtype, generator, std)
    model.tie_weights()
    for (
        module
    ) in model.modules():  # parameters are on the device already; model.to() cannot move fake tensors
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return model


def _replace_linears(
    model: PreTrainedModel,
    quantized: Callable[[str, Tensor], nf4.Params4bit],
    device: torch.device | None = None,
) -> None:
    """Replace the linears that loading quantizes by NF4 linears, one at a time."""
    for name in nf4_layers(model, getattr(model.config, "quantization_config", None)):
        linear = model.get_submodule(name)
        assert is_linear(linear)
        weight = linear.weight.data.T if is_conv1d(linear) else linear.weight.data  # [out, in]
        bias = None if linear.bias is None else linear.bias.data
        if bias is not None and bias.is_meta:
            bias = torch.zeros(bias.shape, dtype=bias.dtype, device=device)
        model.set_submodule(name, nf4.NF4Linear(quantized(name, weight), bias))


def _replace_experts(model: PreTrainedModel, quantized: Callable[[Tensor, int], PackedStack]) -> None:
    """Give the experts' projections that loading quantizes their codes, one projection at a time.

    quantized: returns the NF4 form of the matrices [E, out, in] of a projection, for a number of matrices an expert.
    """
    for name in nf4_experts(model, getattr(model.config, "quantization_config", None)):
        module, own = get_module_from_name(model, name)
        parts = 2 if own == "gate_up_proj" and has_packed_experts(model.config) else 1
        packed = quantized(module.get_parameter(own), parts)
        setattr(module, own, as_parameter(packed))


def _materialise(
    model: nn.Module, device: torch.device, dtype: torch.dtype, generator: torch.Generator, std: float
) -> None:
    """Give values to the parameters that have none: norms one, biases zero, matrices normally distributed."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.is_meta:
                continue
            value = torch.empty(parameter.shape, dtype=dtype, device=device)
            if parameter.ndim > 1:
                value.normal_(0.0, std, generator=generator)
            else:
                value.fill_(0.0 if "bias" in name else 1.0)
            module.register_parameter(name, nn.Parameter(value, requires_grad=False))
