"""Time the loading of adapters and the switch between them, at the shapes of a large model.

    python benchmarks/switching.py --model llama-7b --layers 4 --ranks 16 64

The base has LAYERS layers of random NF4 weights, which a switch does not move. Each adapter covers all linear layers.
A time is the minimum of several; the time of a switch is proportional to the number of layers. Loading reads the
adapter's file, here from the page cache. A SHA-256 before and after checks that the base's bytes did not change.
"""

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from qlora import bundled
from qlora.adapter import Adapters, LoraSpec, adapt, lora_layers, save_adapter
from qlora.model.load import load_base, meta_base
from qlora.recipe import Base

MiB = 2**20


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="llama-7b", help="an architecture that the package ships")
    parser.add_argument("--layers", type=int, default=4, help="number of decoder layers")
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64], help="one adapter of each rank")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = json.loads(bundled.path(f"bundled/configs/{arguments.model}.json").read_text())
        layers, whole = arguments.layers, config["num_hidden_layers"]
        (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
        base = Base(model=str(folder), init="synthetic", compute_dtype="bfloat16")
        for rank in arguments.ranks:
            write_adapter(meta_base(base).model, rank, folder / f"rank{rank}")
        model = load_base(base, arguments.device).eval()
        adapters, before = Adapters(model), fingerprint(model)
        print(
            f"{arguments.model}, {layers} of {whole} layers, torch {torch.__version__}, {arguments.device}\n"
        )
        print("| | ms |\n|---|---:|")
        for rank in arguments.ranks:
            name, place = f"rank{rank}", folder / f"rank{rank}"
            load_ms = timed(partial(adapters.load, name, place), partial(adapters.unload, name))
            size = (place / "adapter_model.safetensors").stat().st_size
            print(f"| load rank {rank} ({size / MiB:.0f} MiB) | {load_ms:.1f} |")
            adapters.load(name, place)
        for name in adapters.names:
            print(f"| activate {name} | {timed(partial(adapters.activate, name), adapters.deactivate):.3f} |")
            print(
                f"| deactivate {name} | {timed(adapters.deactivate, partial(adapters.activate, name)):.3f} |"
            )
        adapters.deactivate()
        assert fingerprint(model) == before
        print(f"\nbase bytes unchanged (SHA-256 {before[:16]}...)")


def write_adapter(model: nn.Module, rank: int, folder: Path) -> None:
    """Write a random adapter for all linear layers of a model on the meta device."""
    adapt(model, LoraSpec(rank=rank, targets="all-linear"))
    for layer in lora_layers(model).values():
        for name in ("lora_a", "lora_b"):
            values = torch.empty(getattr(layer, name).shape, dtype=torch.bfloat16).normal_(0, 0.01)
            setattr(layer, name, nn.Parameter(values))
    save_adapter(model, folder)


def timed(act: Callable[[], object], undo: Callable[[], object], times: int = 7) -> float:
    """Return the minimum time of `act` in ms over several calls, each followed by `undo`."""
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - began)
        undo()
    return min(seconds) * 1000


def fingerprint(model: nn.Module) -> str:
    """Return the SHA-256 of every byte of a model."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().view(torch.uint8).cpu().numpy())
    return digest.hexdigest()


if __name__ == "__main__":
    main()
