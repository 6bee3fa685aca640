"""Merging in memory: each adapted layer becomes a plain layer of the same kind with the update added.

Sums are computed in fp32 (fp64 for fp64 layers) and rounded once, to the dtype of the layer or to NF4.
"""

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora.adapter.adapted_layer import AdaptedLayer
from qlora.adapter.base_digest import memory_digest
from qlora.adapter.identity import BaseIdentity, quantization_of
from qlora.adapter.lora_experts import LoRAExperts
from qlora.adapter.trained_parts import merge_parts
from qlora.adapter.wrap import replace_modules
from qlora.errors import ModelError
from qlora.quantization import nf4
from qlora.quantization.expert_stack import ExpertStack, stacked

TOLERANCE = 0.01
"""share of the adapter's effect that rounding may change without a warning"""


def merge_adapter(model: nn.Module, *, quantize: bool = False) -> nn.Module:
    """Add the adapter of `model` to its weights, in place, so that the model has plain layers again.

    Rows of tokens and modules that were trained beside the adapter become part of the model too. The merged model
    computes the same as the adapted one in eval mode, up to rounding. It stays frozen. If rounding to the layers' dtype
    or to NF4 changed the weights by more than 1% of the adapter's update, a warning gives the share.

    If a merged weight is tied to another layer, such as an embedding to the output head, the other layer keeps the old
    weight, as in the adapted model. `config.tie_word_embeddings`, if there is one, then becomes False.

    Args:
        model: a model with an adapter, from `adapt` or `load_adapter`.
        quantize: quantize merged NF4 layers to NF4 again, with the same block size. Without it they become dense, in
            the dtype that they were quantized from: exact, but four times as large.

    Returns:
        The same model; or the new layer, if `model` is an adapted layer itself.

    Raises:
        ModelError: the model has no adapter.

    Examples:
        >>> model = merge_adapter(load_adapter(model, "runs/mine/adapter"))
    """
    layers = AdaptedLayer.of(model)
    if not layers:
        raise ModelError("the model has no adapter: there is nothing to merge. Load one with load_adapter")
    _untie(model, layers)
    error = effect = 0.0
    for name in list(layers):
        layer = layers.pop(name)  # so that the old weight is freed before the next layer is merged
        merged = _merged(layer, quantize)
        error, effect = error + merged.error, effect + merged.effect
        replace_modules(model, {layer: merged.module})
        model = merged.module if layer is model else model
    _warn_of_rounding(error, effect)
    merge_parts(model)
    # The model is another base now: an adapter that is added next must not claim the old one
    model.base_identity = BaseIdentity(weights=memory_digest(model), quantization=quantization_of(model))  # type: ignore[assignment]
    model.initial_values = None  # type: ignore[assignment]
    return model


@dataclass(frozen=True)
class _Merged:
    module: nn.Module
    error: float = 0.0
    """squared Frobenius norm of the rounding of the weight"""
    effect: float = 0.0
    """squared Frobenius norm of the update of the weight"""


def _merged(layer: AdaptedLayer, quantize: bool) -> _Merged:
    base: Any = layer.base
    if isinstance(layer, LoRAExperts):
        return _merged_experts(layer, quantize)
    state: Any = nf4.quant_state(base) if nf4.is_nf4(base) else None
    bias = base._parameters.get("bias")
    if layer.changes_bias:
        dtype = base.weight.dtype if state is None else state.dtype
        bias = _frozen(layer.merged_bias(), dtype if bias is None else bias.dtype)
    if not layer.changes_weight:
        return _Merged(_like(base, base.weight, bias))
    exact = layer.merged_weight()
    exact = exact.T if layer.fan_in_fan_out else exact
    before = nf4.dense(base.weight, state, exact.dtype)
    if state is None:
        module: Any = _like(base, _frozen(exact, base.weight.dtype), bias)
        stored = module.weight.to(exact.dtype)
    elif quantize:
        weight = nf4.quantize(exact, state.blocksize, state.nested)
        weight.quant_state.dtype = state.dtype
        module = nf4.NF4Linear(weight, bias)
        stored = nf4.dequantize(weight, weight.quant_state, exact.dtype)
    else:
        module = _dense(_frozen(exact, state.dtype), bias)
        stored = module.weight.to(exact.dtype)
    return _Merged(module.train(base.training), _square(stored - exact), _square(exact - before))


def _merged_experts(layer: LoRAExperts, quantize: bool) -> _Merged:
    """Merge the projection of all experts, one expert at a time."""
    base, wide = layer.base, torch.float64 if layer.lora_a.dtype == torch.float64 else torch.float32
    dtype, settings = base.weight.dtype, None
    if base.packed:
        dtype, settings = base.storage.dtype, (base.storage.block_size, base.storage.scales is not None)
    stored: list[Any] = []
    error = effect = 0.0
    for expert in range(base.experts):
        before = base.matrix(expert, wide)
        exact = layer.merged_matrix(expert, before)
        one = exact.T if base.transposed else exact
        if settings is not None and quantize:
            weight = nf4.quantize(one, *settings)
            weight.quant_state.dtype = dtype
            stored.append(weight)
            kept = nf4.dequantize(weight, weight.quant_state, exact.dtype)
        else:
            stored.append(one.to(dtype))
            kept = stored[-1].to(exact.dtype)
        error, effect = error + _square(kept - one), effect + _square(exact - before)
    made = stacked(stored) if settings is not None and quantize else torch.stack(stored)
    module = ExpertStack(made, base.bias, transposed=base.transposed, active=base.active)
    return _Merged(module.train(base.training), error, effect)


def _like(base: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """Return a copy of `base` with its type, settings and hooks, and with these parameters."""
    module = copy.copy(base)
    module._parameters = {**base._parameters, "weight": weight}  # type: ignore[dict-item]
    if bias is not None:
        module.__dict__.pop("bias", None)  # None there, as in a 4-bit layer, would hide the parameter
        module._parameters["bias"] = bias  # type: ignore[assignment]
    return module


def _dense(weight: nn.Parameter, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = weight
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear


def _frozen(tensor: Tensor, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(tensor.to(dtype).contiguous(), requires_grad=False)


def _square(difference: Tensor) -> float:
    return float(torch.linalg.vector_norm(difference.double())) ** 2


def _untie(model: nn.Module, layers: dict[str, AdaptedLayer]) -> None:
    """Tell the config of a transformers model that its head no longer shares a weight that the adapter changes."""
    config: Any = getattr(model, "config", None)
    if not getattr(config, "tie_word_embeddings", False):
        return
    changed = {id(layer.base.weight) for layer in layers.values() if layer.changes_weight}
    adapted = {id(layer.base) for layer in layers.values()}
    if any(
        id(module._parameters.get("weight")) in changed and id(module) not in adapted
        for module in model.modules()
    ):
        config.tie_word_embeddings = False


def _warn_of_rounding(error: float, effect: float) -> None:
    if error > TOLERANCE**2 * effect:
        share = (error / effect) ** 0.5 if effect else float("inf")
        warnings.warn(
            f"rounding changed the merged weights by {share:.1%} of the adapter's update (Frobenius norm). For an "
            "exact merge, merge in float32; for NF4 layers, without quantize=True",
            stacklevel=3,
        )
