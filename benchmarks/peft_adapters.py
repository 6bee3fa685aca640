"""Compare the logits of published adapters, loaded by this package, with those of PEFT.

    python benchmarks/peft_adapters.py ADAPTER_FOLDER ... [--config config.json]

Needs PEFT. Both load the adapter on the same random base, so nothing is downloaded. Its architecture is that of the
base that the adapter names, or of --config. The comparison runs in fp32 and in fp64, where only rounding can differ.
This package refuses an adapter whose values are not finite; such an adapter is tried again with random values. Prints a
Markdown table.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GemmaConfig, OPTConfig

from qlora.adapter import load_adapter, lora_layers
from qlora.errors import ModelError

# Attention has its full size. Parts without an adapter (vocabulary, Gemma's feed-forward) are smaller, to save memory
ARCHITECTURES: dict[str, Any] = {
    "facebook/opt-125m": OPTConfig(vocab_size=4096),
    "google/gemma-2b": GemmaConfig(
        vocab_size=512,
        hidden_size=2048,
        intermediate_size=256,
        num_hidden_layers=18,
        num_attention_heads=8,
        num_key_value_heads=1,
        head_dim=256,
    ),
}


def base(config: Any) -> nn.Module:
    """Build a model with random weights, the same at every call."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: nn.Module, dtype: torch.dtype) -> Tensor:
    """Return the logits of a fixed input, [1, 32, vocabulary], in float64."""
    return model.eval().to(dtype)(input_ids=torch.arange(32)[None] * 7 + 3).logits.double()


def with_finite_numbers(folder: Path, copy: Path) -> Path:
    """Copy the adapter in `folder` with random values instead of its own; return `copy`."""
    shutil.copytree(folder, copy)
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(copy / "adapter_model.safetensors")
    for tensor in tensors.values():
        tensor.normal_(0, 0.02, generator=generator)
    save_file(tensors, copy / "adapter_model.safetensors")
    return copy


def compare(folder: Path, config: Any, label: str) -> None:
    """Print one row of the table for each dtype."""
    for dtype in (torch.float32, torch.float64):
        plain = logits(base(config), dtype)
        ours = load_adapter(base(config), folder)
        count, actual = len(lora_layers(ours)), logits(ours, dtype)
        del ours
        expected = logits(peft.PeftModel.from_pretrained(base(config), str(folder)), dtype)
        effect, difference = (expected - plain).abs().max(), (actual - expected).abs().max()
        name = str(dtype).removeprefix("torch.")
        print(
            f"| {label} | {count} | {name} | {expected.abs().max():.3f} | {effect:.1e} | {difference:.1e} |"
        )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("adapters", nargs="+", type=Path)
    parser.add_argument(
        "--config", help="config.json of the base, if its architecture is not in ARCHITECTURES"
    )
    arguments = parser.parse_args()
    print("| adapter | layers | dtype | largest logit | effect of the adapter | difference from PEFT |")
    print("|---|---:|---|---:|---:|---:|")
    for folder in arguments.adapters:
        name = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        config = AutoConfig.from_pretrained(arguments.config) if arguments.config else ARCHITECTURES[name]
        try:
            compare(folder, config, folder.name)
        except ModelError as error:
            print(f"| {folder.name} | refused: {error} | | | | |")
            with tempfile.TemporaryDirectory() as scratch:
                finite = with_finite_numbers(folder, Path(scratch) / folder.name)
                compare(finite, config, f"{folder.name}, random values")


if __name__ == "__main__":
    main()
