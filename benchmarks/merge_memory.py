"""Measure the host memory and the time of a merge, on random weights in the shapes of a large model.

    python benchmarks/merge_memory.py --model llama-65b --layers 1 --onto nf4 --folder FOLDER

Writes the checkpoint, an adapter for all linear layers and the merged model to FOLDER and removes them at the end. This
needs twice the checkpoint's size on disk. A merge reads one tensor and holds one shard at a time, so its memory depends
on the largest tensor and on the adapter, not on the number of layers.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import torch

from qlora import bundled
from qlora.adapter.lora_spec import LoraSpec
from qlora.adapter.methods.lora import adapt, lora_layers
from qlora.adapter.store import save_adapter
from qlora.memory.measure import peak
from qlora.merging.merge import merge
from qlora.model.load import meta_base
from qlora.recipe import Base, Recipe
from qlora.storage.safetensors_files import ShardWriter

GiB = 2**30


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="llama-65b", help="an architecture that the package ships")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--onto", default="dequantized", choices=["original", "dequantized", "nf4"])
    parser.add_argument("--folder", type=Path, required=True, help="a new folder; it is removed at the end")
    arguments = parser.parse_args()
    arguments.folder.mkdir()
    try:
        size = write_checkpoint(arguments.folder / "base", arguments.model, arguments.layers)
        write_adapter(arguments.folder, arguments.rank)
        before, began = resident(), time.perf_counter()
        merge(arguments.folder / "adapter", arguments.folder / "merged", onto=arguments.onto, max_tokens=0)
        seconds = time.perf_counter() - began
        print(
            f"{arguments.model}, {arguments.layers} layers, {size / GiB:.2f} GiB in bf16, onto {arguments.onto}: "
            f"{resident() / GiB:.2f} GiB peak resident ({before / GiB:.2f} before), {seconds:.0f} s"
        )
    finally:
        shutil.rmtree(arguments.folder)


def write_checkpoint(folder: Path, architecture: str, layers: int) -> int:
    """Write random bf16 weights in shards and the bundled tokenizer; return the bytes of the weights."""
    folder.mkdir()
    config = json.loads(bundled.path(f"bundled/configs/{architecture}.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    for file in bundled.path("bundled/base").glob("tokenizer*"):
        shutil.copy(file, folder)
    with ShardWriter(folder, shard_bytes=2**28) as writer:
        for name, parameter in meta_base(Base(model=str(folder))).model.named_parameters():
            writer.add(name, torch.empty(parameter.shape, dtype=torch.bfloat16).normal_(0, 0.02))
    return writer.total_bytes


def write_adapter(folder: Path, rank: int) -> None:
    """Write an adapter whose update is not zero, and the recipe that names its base."""
    model = adapt(
        meta_base(Base(model=str(folder / "base"))).model, LoraSpec(rank=rank, targets="all-linear")
    )
    for layer in lora_layers(model).values():
        for name in ("lora_a", "lora_b"):
            values = torch.empty(getattr(layer, name).shape, dtype=torch.bfloat16).normal_(0, 0.01)
            setattr(layer, name, torch.nn.Parameter(values))
    save_adapter(model, folder / "adapter")
    data = {"source": "bundled/tickets/train.jsonl", "format": "messages"}
    recipe = Recipe.from_dict({"base": {"model": str(folder / "base")}, "data": data})
    (folder / "adapter" / "recipe.yaml").write_text(recipe.to_yaml())


def resident() -> int:
    """Return the peak resident bytes of this process so far."""
    return peak(torch.device("cpu")).resident_bytes


if __name__ == "__main__":
    main()
