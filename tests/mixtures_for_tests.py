"""Small mixtures of experts as checkpoints, in 16 bits and in NF4 as transformers 4 and 5 write them."""

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from architectures_for_tests import config
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qlora import bundled
from qlora.model.load import load_base
from qlora.quantization import nf4
from qlora.quantization.transformers_loader import nf4_config
from qlora.recipe import Base

WEIGHTS = "model.safetensors"

IDS = torch.arange(24).view(2, 12) * 7

LEAVES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
"""Mixtral's names"""

Experts = Literal["in NF4", "in 16 bits", "in one tensor"]


def write_mixture(folder: Path, architecture: str, **settings: Any) -> Path:
    """Write a checkpoint of a small mixture with large weights, in the layout of its published ones."""
    torch.manual_seed(0)
    own = {"num_hidden_layers": 2, "vocab_size": 2048, **settings}
    model = AutoModelForCausalLM.from_config(config(architecture, **own), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled.path("bundled/base") / file, folder)
    return folder


def plain(folder: Path) -> Any:
    """Return transformers' model in fp32 with its own loop over experts."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    ).eval()


def base(folder: Path, **settings: Any) -> Any:
    """Return our model in fp32."""
    return load_base(Base(model=str(folder), compute_dtype="float32", **settings)).eval()


def logits(model: nn.Module) -> Tensor:
    """Return the logits of `IDS`."""
    with torch.no_grad():
        result: Tensor = model.eval()(input_ids=IDS).logits.float()
    return result


def write_nf4_mixture(
    source: Path, folder: Path, experts: Experts, *, double_quant: bool = True, block_size: int = 64
) -> tuple[Path, Path]:
    """Write a 16-bit mixture as an NF4 checkpoint, and as a 16-bit one with the values that this has.

    experts: "in NF4" as transformers 4 writes them, and its routers with them; "in 16 bits" with a matrix for each; or
        all experts of a layer "in one tensor" in 16 bits, as transformers 5 can write them.

    Returns:
        The folders of the NF4 checkpoint and of the one in 16 bits, whose experts are those of the first.
    """
    packed: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    for name, tensor in load_file(source / WEIGHTS).items():
        expert = ".experts." in name
        router = name.endswith((".gate.weight", ".router.weight"))
        linear = tensor.ndim == 2 and not any(part in name for part in ("embed_tokens", "lm_head"))
        if (linear and not (expert or router)) or ((expert or router) and experts == "in NF4"):
            weight = nf4.quantize(tensor, block_size, double_quant)
            packed |= {name + suffix: value for suffix, value in nf4.to_tensors(weight).items()}
            plain[name] = nf4.dequantize(weight, weight.quant_state, torch.float32)
        else:
            packed[name] = plain[name] = tensor
    if experts == "in one tensor":
        packed = _in_one_tensor(packed)
    quantization = nf4_config(
        Base(model="x", block_size=block_size, double_quant=double_quant), torch.bfloat16
    ).to_dict()
    if block_size == 64:
        del quantization["block_size"]  # which transformers does not write
    for kind, tensors in (("nf4", packed), ("plain", plain)):
        shutil.copytree(source, folder / kind, ignore=shutil.ignore_patterns(WEIGHTS))
        save_file(tensors, folder / kind / WEIGHTS, {"format": "pt"})
    fields = json.loads((source / "config.json").read_text())
    (folder / "nf4/config.json").write_text(json.dumps({**fields, "quantization_config": quantization}))
    return folder / "nf4", folder / "plain"


def _in_one_tensor(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors with the experts of each layer as transformers 5 has them in memory."""
    found: dict[str, dict[str, list[Tensor]]] = {}
    others = {}
    for name, tensor in tensors.items():
        prefix, inside, rest = name.partition(".experts.")
        if inside:
            found.setdefault(f"{prefix}.experts", {}).setdefault(rest.split(".")[1], []).append(tensor)
        else:
            others[name] = tensor
    for name, own in found.items():
        stacked = {LEAVES.get(leaf, leaf): torch.stack(matrices) for leaf, matrices in own.items()}
        others[f"{name}.gate_up_proj"] = torch.cat([stacked["gate_proj"], stacked["up_proj"]], dim=1)
        others[f"{name}.down_proj"] = stacked["down_proj"]
    return others
