"""`qlora adapter inspect` of an adapter without spectra: the change of each layer."""

import json
from pathlib import Path

from qlora.cli.base_weights import base_weights
from qlora.cli.tables import say, show_changes
from qlora.errors import ModelError


def print_changes(adapter: Path, base: str | None, per_layer: bool, json_output: bool) -> None:
    """Print the norm of each layer's change, for an adapter without spectra."""
    from qlora.adapter.algebra import tensors
    from qlora.adapter.algebra.changes import changes, part_shapes
    from qlora.adapter.config import CONFIG_FILE, read_fields
    from qlora.adapter.trained_parts import describe_parts

    folder = tensors.adapter_folder(adapter)
    config = read_fields(folder / CONFIG_FILE)
    weights = base_weights(tensors.without_layers(folder, config), base)
    if weights is None:
        raise ModelError(
            f"{folder}: the change of each layer is measured against the base, which is not cached, large, or has "
            "changed. Give it with --base"
        )
    layers = changes(folder, weights)
    if json_output:
        plain = {name: layer.as_json() for name, layer in layers.items()}
        print(json.dumps({"layers": plain, "parts": part_shapes(folder)}))
        return
    show_changes(layers, per_layer)
    for line in describe_parts(config):
        say(f"\n{line}")
