"""Projections of experts in a checkpoint's files, read and written in the layout that the files have.

Most published mixtures keep a matrix for each expert, with gate and up apart; others keep the model's parameters with
three dimensions. transformers knows the layouts of its models (`conversion_mapping`) and converts both ways here.
Experts in MXFP4 are written in 16 bits, under the names of the parameters.
"""

from collections.abc import Collection
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from qlora.errors import ModelError, listed
from qlora.quantization.mxfp4 import dequantize, is_packed, parameter_of
from qlora.storage.safetensors_files import ShardReader


class ExpertFiles:
    """The tensors of a checkpoint that hold projections of experts.

    Args:
        model: the model on the meta device.
        projections: names of its projections, such as `model.layers.0.mlp.experts.down_proj`.
        reader: the files.

    Raises:
        ModelError: a projection is not in the files.
    """

    def __init__(self, model: Any, projections: Collection[str], reader: ShardReader) -> None:
        self._model, self._reader = model, reader
        conversions = get_model_conversion_mapping(model)
        renamings = [change for change in conversions if isinstance(change, WeightRenaming)]
        converters = [change for change in conversions if isinstance(change, WeightConverter)]
        self._converters = {
            pattern: converter for converter in converters for pattern in converter.source_patterns
        }
        self._keys: dict[str, list[tuple[str, str | None]]] = {}
        known = dict.fromkeys(projections)
        for key in sorted(reader, key=dot_natural_key) if known else ():
            own = parameter_of(key) if is_packed(key) else key
            name, pattern = rename_source_key(own, renamings, converters, model.base_model_prefix, known)
            if name in known:
                self._keys.setdefault(name, []).append((key, pattern))
        if missing := sorted(known.keys() - self._keys.keys()):
            raise ModelError(
                f"{reader.folder}: {len(missing)} of the model's projections of experts ({listed(missing)}) are not in "
                "these files, or under a name that transformers does not know. Use base and adapter without merging"
            )

    def keys(self, projection: str) -> list[str]:
        """Return the names of the tensors in the files that hold a projection."""
        return [key for key, _ in self._keys[projection]]

    def read(self, projection: str) -> Tensor:
        """Return the matrices [E, ...] of a projection as the model stores them."""
        places = self._keys[projection]
        pattern = places[0][1]
        if is_packed(places[0][0]):
            blocks, scales = sorted(key for key, _ in places)
            return dequantize(self._reader[blocks], self._reader[scales])
        if pattern is None:
            return self._reader[places[0][0]]
        converter = deepcopy(self._converters[pattern])
        for key, own in places:
            converter.add_tensor(projection, key, own, self._reader[key])
        result: Tensor = converter.convert(projection, model=self._model, config=self._model.config)[
            projection
        ]
        return result

    def norm(self, projection: str) -> float:
        """Return the Frobenius norm of all matrices of a projection."""
        return torch.linalg.vector_norm(self.read(projection), dtype=torch.float64).item()

    def stored(self, projection: str, matrices: Tensor) -> dict[str, Tensor]:
        """Return matrices [E, ...] of a projection as the tensors of the files, by their names."""
        keys = self.keys(projection)
        if self._keys[projection][0][1] is None:
            return {parameter_of(keys[0]): matrices}
        found = revert_weight_conversion(self._model, {projection: matrices})
        # the files can have the decoder's prefix, or lack it
        prefix = f"{self._model.base_model_prefix}."
        own = {key.removeprefix(prefix): key for key in keys}
        tensors = {own.get(name.removeprefix(prefix), name): tensor for name, tensor in found.items()}
        assert tensors.keys() == set(keys), f"{sorted(tensors)[:3]} are not {keys[:3]}"
        return tensors
