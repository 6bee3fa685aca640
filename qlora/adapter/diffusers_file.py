"""The file of an adapter that diffusers' LoRA loader reads, next to PEFT's files in an adapter folder.

    pytorch_lora_weights.safetensors    <component>.<path of the layer>.lora_A.weight and lora_B.weight; the fields of
                                        adapter_config.json, with the same prefix, are in the header

`load_lora_weights` of a pipeline and `load_lora_adapter` of a model find it by its name. The component is the model's
name in the pipeline, such as unet or transformer.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from qlora.adapter.peft_tensors import PREFIX
from qlora.errors import ModelError, listed
from qlora.storage import tensor_file

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
HEADER = "lora_adapter_metadata"
LAYERS = (".lora_A.weight", ".lora_B.weight")


def check_diffusers(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], changed: str | None = None
) -> None:
    """Raise ModelError if diffusers cannot read an adapter.

    Args:
        tensors: its tensors, by PEFT's names.
        config: the fields of adapter_config.json.
        changed: change to the base before training, as in `BaseIdentity`.
    """
    if changed is not None:
        raise ModelError(
            f"diffusers loads adapters onto the unchanged base, and this base was changed by {changed}. Convert the "
            "adapter first: qlora adapter export ADAPTER --to DIR --diffusers COMPONENT"
        )
    if config.get("peft_type") != "LORA":
        raise ModelError(
            f"diffusers reads adapters of LoRA, not of peft_type {config.get('peft_type')}. Save it without diffusers"
        )
    if config.get("use_dora"):
        raise ModelError(
            "the file for diffusers holds A and B, and this adapter of DoRA has trained norms as well (use_dora). Save "
            "it without diffusers, and merge it into the model (qlora.merge_adapter); or train LoRA"
        )
    if config.get("init_lora_weights") == "pissa":
        raise ModelError(
            "diffusers would add this adapter to the unchanged base, and PiSSA changed its base. Save it without "
            "diffusers, and convert it: qlora adapter export"
        )
    if others := sorted(name.removeprefix(PREFIX) for name in tensors if not name.endswith(LAYERS)):
        raise ModelError(
            f"diffusers reads A and B of linear layers and convolutions, not {listed(others)}. Leave such layers out "
            "of the targets, or save the adapter without diffusers"
        )


def write_diffusers(
    file: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], component: str
) -> None:
    """Write the tensors for diffusers to `file`.

    Args:
        file: `DIFFUSERS_FILE` in the adapter folder.
        tensors: A and B of each layer, by PEFT's names.
        config: the fields of adapter_config.json.
        component: name of the model in diffusers' pipeline: unet, transformer or another.

    Raises:
        OSError, SafetensorError: the file cannot be written.
    """
    named = {f"{component}.{name.removeprefix(PREFIX)}": tensor for name, tensor in tensors.items()}
    fields = {f"{component}.{field}": value for field, value in config.items()}
    header = {"format": "pt", HEADER: json.dumps(fields, indent=2, sort_keys=True)}
    tensor_file.write(file, named, header)
