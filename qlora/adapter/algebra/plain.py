"""Adapters for servers that read one alpha and one rank: rsLoRA's scaling and patterns folded into A and B.

PEFT scales each layer by its own alpha and rank. vLLM uses alpha and rank of the config for all layers, llama.cpp the
config's alpha over the rank of the tensor; neither reads the patterns, and llama.cpp does not read `use_rslora`. In a
plain adapter all of these rules give the same factor: one alpha, one rank, no patterns, no rsLoRA.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import pad

from qlora.adapter.algebra.compose import ApproximationError
from qlora.adapter.algebra.tensors import Adapter, dtype_name
from qlora.adapter.config import CONFIG_FILE, commonest
from qlora.adapter.peft_experts import has_experts
from qlora.adapter.store import method_for
from qlora.adapter.trained_parts import has_parts
from qlora.errors import ModelError

PARTICULAR = {"use_rslora": "rsLoRA's scaling", "alpha_pattern": "alphas of single layers",
              "rank_pattern": "ranks of single layers"}  # fmt: skip
"""Fields of adapter_config.json that only PEFT and qlora obey, with their meaning."""


def particulars(config: Mapping[str, Any]) -> str | None:
    """Return the settings of an adapter that other servers do not read, in words; None for a plain adapter."""
    used = [words for field, words in PARTICULAR.items() if config.get(field)]
    return " and ".join(used) or None


def note(config: Mapping[str, Any], folder: object, *, exported: bool = False) -> str | None:
    """Return a note for the user about what other servers do not read in the adapter in `folder`; None if nothing.

    exported: True if `qlora adapter export` wrote it.
    """
    method = method_for(config, Path(f"{folder}/{CONFIG_FILE}"))
    export, merge = f"qlora adapter export {folder} --to DIR", f"merge: qlora merge {folder} --to DIR"
    unread = f"vLLM and llama.cpp do not read adapters of {method.name}. For them"
    if method.why_no_sum is not None:
        return f"{unread}, {method.merge_needs}{merge}"
    if config.get("init_lora_weights") == "pissa":
        return (
            "the adapter belongs to a base without its principal part (PiSSA), which qlora makes again; other programs "
            f"would add it to the unchanged base. For them: {export}"
        )
    if has_parts(config):
        beside = (
            "tokens or modules were trained beside the adapter: "
            "PEFT and qlora read them, vLLM and llama.cpp do not"
        )
        # a checkpoint often has one tensor for each expert where the model has one for all, and no merge then
        experts = any("experts" in name for name in config.get("modules_to_save") or ())
        return beside if experts else f"{beside}. For them, {merge}"
    if config["peft_type"] != "LORA":
        return f"{unread}: {export}"
    if has_experts(config) and not exported:
        return (
            "the adapter has the experts of a layer in one tensor, as PEFT and qlora read them. For vLLM and SGLang: "
            f"{export}; for llama.cpp, {merge}"
        )
    used = particulars(config)
    return used and (
        f"the adapter has {used}: PEFT and qlora read this, but vLLM and llama.cpp take one alpha and one rank for "
        f"all layers and would compute something else. For them: {export}"
    )


def plain(
    adapter: Adapter, *, dtype: torch.dtype = torch.float32
) -> tuple[Adapter, dict[str, ApproximationError]]:
    """Return the same updates with one alpha and one rank, and the rounding error of each layer.

    The rank is the largest one; A gets rows of zeros and B columns of zeros. Layers that have the commonest scaling
    keep their numbers; elsewhere B is multiplied by the quotient of the scalings.

    Args:
        adapter: the adapter.
        dtype: dtype of A and B in the result.

    Raises:
        ModelError: a number is too large for `dtype`.
    """
    rank = max(layer.rank for layer in adapter.layers.values())
    scaling = commonest([layer.scaling for layer in adapter.layers.values()])
    if not (scaling * rank).is_integer():
        scaling = 1.0  # servers keep alpha as a whole number
    layers, deviations = {}, {}
    for name, layer in adapter.layers.items():
        added = rank - layer.rank
        b = layer.b if layer.scaling == scaling else layer.b.double() * (layer.scaling / scaling)
        a, b = pad(layer.a, (0, 0, 0, added)).to(dtype), pad(b, (0, added)).to(dtype)
        if not (a.isfinite().all() and b.isfinite().all()):
            raise ModelError(
                f"the update of {name} is too large for {dtype_name(dtype)}; use a wider --dtype"
            )
        layers[name] = replace(layer, a=a, b=b, alpha=scaling * rank, scaling=scaling)
        deviations[name] = ApproximationError.between(layers[name], layer.update)
    return replace(adapter, layers=layers), deviations
