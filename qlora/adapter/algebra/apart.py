"""Adapters of experts for servers that read matrices of each expert.

PEFT keeps the updates of all experts of a projection in one pair of tensors. vLLM and SGLang read, of most mixtures, a
pair for each matrix of each expert, under the names of the matrices in the base's files:

    model.layers.0.mlp.experts.7.gate_proj.lora_A.weight                 Qwen 3
    model.layers.0.block_sparse_moe.experts.7.w1.lora_A.weight           Mixtral

transformers knows these names. Where gate and up are one projection here, both get its A, and each its rows of B.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from qlora.adapter.algebra.tensors import Adapter, Layer
from qlora.adapter.peft_experts import FIELD, OF_ONE_EXPERT
from qlora.errors import ModelError, listed
from qlora.quantization.expert_stack import is_experts

STACKED = frozenset(["qwen3_5_moe", "qwen3_5_moe_text"])
"""model types whose published files have all experts in one tensor, although transformers also knows names for each"""


def are_apart(adapter: Adapter, model: Any) -> bool:
    """Return True if the published files of the base have matrices of each expert that is adapted.

    Args:
        adapter: an adapter of experts.
        model: the architecture of its base, also on the meta device.

    Raises:
        ModelError: the experts of the adapter are not in the model.
    """
    check_experts(adapter, model)
    if model.config.model_type in STACKED:
        return False
    return all(_named(model, name, adapter.layers[name].b) is not None for name in adapter.experts)


def apart(adapter: Adapter, model: Any) -> Adapter:
    """Return the adapter with a layer for each matrix of each expert, with the same updates.

    The names are those of the base's files. If these have all experts in one tensor, the matrices are called
    gate_proj, up_proj and down_proj.

    Args:
        adapter: an adapter.
        model: the architecture of its base, also on the meta device.

    Raises:
        ModelError: the experts of the adapter are not in the model.
    """
    check_experts(adapter, model)
    layers: dict[str, Layer] = {}
    for name, layer in adapter.layers.items():
        layers |= _matrices(model, name, layer) if layer.has_experts else {name: layer}
    config = {key: value for key, value in adapter.config.items() if key != FIELD}
    config["target_modules"] = sorted({name.rpartition(".")[2] for name in layers})
    return replace(adapter, config=config, layers=layers)


def check_experts(adapter: Adapter, model: Any) -> None:
    """Raise ModelError if a projection of experts in the adapter is not one of the model, or has another shape."""
    modules = dict(model.named_modules())
    outside = []
    for name in adapter.experts:
        owner, _, projection = name.rpartition(".")
        module: Any = modules.get(owner)
        weight = getattr(module, projection, None) if module is not None and is_experts(module) else None
        layer = adapter.layers[name]
        shape = (len(layer.a), layer.b.shape[1], layer.a.shape[2])
        if weight is None or shape != tuple((weight.mT if module.is_transposed else weight).shape):
            outside.append(name)
    if outside:
        raise ModelError(
            f"{len(outside)} of the adapter's projections of experts ({listed(outside)}) are not in "
            f"{type(model).__name__}, or have other sizes there. Give the base that the adapter was trained on, with "
            "--base"
        )


def _matrices(model: Any, name: str, layer: Layer) -> dict[str, Layer]:
    """Return a layer for each matrix of a projection, by name."""
    rows = _named(model, name, layer.b)
    if rows is None:
        rows = _numbered(model, name, layer.b)
    return {key: replace(layer, a=layer.a[expert].clone(), b=b) for key, (expert, b) in rows.items()}


def _named(model: Any, name: str, b: Tensor) -> dict[str, tuple[int, Tensor]] | None:
    """Return the expert and the rows of B [E, out, rank] by the names of the matrices in the base's files.

    None if the files have all experts in one tensor.
    """
    if model.get_submodule(name.rpartition(".")[0]).is_transposed:
        return None
    found = {}
    for key, rows in revert_weight_conversion(model, {name: b}).items():
        matrix = key.removesuffix(".weight")
        if (match := OF_ONE_EXPERT.search(matrix)) is None:
            return None
        found[matrix] = int(match[1]), rows.clone()
    return found


def _numbered(model: Any, name: str, b: Tensor) -> dict[str, tuple[int, Tensor]]:
    """Return the expert and the rows of B [E, out, rank] under names of our own."""
    owner, _, projection = name.rpartition(".")
    parts = {projection: b}
    if projection == "gate_up_proj":
        concatenated = model.get_submodule(owner).is_concatenated
        gate, up = b.chunk(2, 1) if concatenated else (b[:, ::2], b[:, 1::2])
        parts = {"gate_proj": gate, "up_proj": up}
    return {
        f"{owner}.{expert}.{part}": (expert, rows[expert].clone())
        for expert in range(len(b))
        for part, rows in parts.items()
    }
