"""Tensors of a checkpoint that its model has no place for, found from the headers of the files alone.

transformers leaves such tensors out when it loads a model, and the result can be another model than the one that was
trained: with fewer layers, or without biases. It is asked here with tensors that have a shape and no values.
"""

import copy
import re
from typing import Any

import torch

from qlora.errors import listed
from qlora.model.load import meta_model
from qlora.model.locate import locate
from qlora.model.quiet import quiet
from qlora.quantization.mxfp4 import is_mxfp4, is_packed
from qlora.quantization.packed_weights import STATISTICS
from qlora.recipe import Base
from qlora.storage.safetensors_files import checkpoint_files, find_checkpoint, stored_tensors

SENSES = re.compile(r"vision|visual|image|video|audio|speech|multi_?modal|(^|\.)mm_")
"""parts of a model that read something else than text"""


def unused_notes(base: Base, config: Any) -> list[str]:
    """Return remarks that name the tensors of the checkpoint that a run does not use; none if it uses all.

    Args:
        base: the recipe's `base` section.
        config: its transformers configuration.
    """
    names = unused_tensors(base, config)
    senses = [name for name in names if SENSES.search(name)]
    others = [name for name in names if not SENSES.search(name)]
    notes = []
    if others:
        notes.append(
            f"base.model: {len(others):,} of the checkpoint's tensors are not used, because the model in its "
            f"config.json has no such weights: {listed(others)}. If that is wrong, mend config.json"
        )
    if senses:
        notes.append(
            f"base.model: {len(senses):,} of the checkpoint's tensors are not used, those for images or sound "
            f"({listed(senses, most=1)}): a run trains the text part alone"
        )
    return notes


def unused_tensors(base: Base, config: Any) -> list[str]:
    """Return the names of the tensors that transformers leaves out when it loads the base, without those it expects to.

    Empty for a base without files on this machine, or with files that cannot be read: loading it says so.
    """
    if base.init != "pretrained":
        return []
    config = copy.deepcopy(config)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config  # the packed weights have other shapes, which are not compared
    try:
        files = checkpoint_files(find_checkpoint(locate(base), base.revision))
        stored = {tensor.name: tensor.shape for file in files for tensor in stored_tensors(file)}
        empty = {
            name: torch.empty(shape, dtype=torch.bfloat16, device="meta")
            for name, shape in stored.items()
            if not STATISTICS.search(name) and not (is_mxfp4(config) and is_packed(name))
        }
        model = meta_model(base, config, torch.bfloat16)
        with quiet():
            _, report = type(model).from_pretrained(
                None, config=model.config, state_dict=empty, device_map={"": "meta"}, dtype=torch.bfloat16,
                ignore_mismatched_sizes=True, output_loading_info=True,
            )  # fmt: skip
    except Exception:  # noqa: BLE001 - the model's code can fail in any way, and this is a remark only
        return []
    return sorted(report["unexpected_keys"])
