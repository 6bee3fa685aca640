"""Parameters of a model in a checkpoint's files, above all projections of experts, read and written as the files are.

Most published mixtures keep a matrix for each expert, with gate and up apart; others keep the model's parameters with
three dimensions. transformers knows the layouts of its models (`conversion_mapping`) and converts both ways here.
An NF4 checkpoint has its experts in 16 bits, or each matrix of an expert in NF4, as transformers 4 wrote it. Experts in
MXFP4 and in NF4 are written in 16 bits, those in MXFP4 under the names of the parameters.
"""

from collections.abc import Collection
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from qlora.errors import ModelError, first_line, listed
from qlora.quantization import nf4
from qlora.quantization.expert_stack import ExpertStack, PackedStack, quantize, stacked
from qlora.quantization.mxfp4 import dequantize, is_packed, parameter_of
from qlora.quantization.packed_weights import PackedWeights, require_alike
from qlora.quantization.stored_form import why_another_weight
from qlora.storage.safetensors_files import ShardReader


class StoredParameters:
    """The tensors of a checkpoint that hold parameters of a model.

    Args:
        model: the model on the meta device.
        names: names of parameters, such as `model.layers.0.mlp.experts.down_proj`.
        reader: the files.
    """

    def __init__(self, model: Any, names: Collection[str], reader: ShardReader) -> None:
        self._model, self._reader = model, reader
        self.packed = PackedWeights(reader)
        """the weights in NF4"""
        statistics = {name for own in self.packed.statistics.values() for name in own}
        conversions = get_model_conversion_mapping(model)
        renamings = [change for change in conversions if isinstance(change, WeightRenaming)]
        converters = [change for change in conversions if isinstance(change, WeightConverter)]
        self._converters = {
            pattern: converter for converter in converters for pattern in converter.source_patterns
        }
        self._keys: dict[str, list[tuple[str, str | None]]] = {}
        known = dict.fromkeys(names, True)  # transformers looks for values that are not None
        for key in sorted(reader.stored.keys() - statistics, key=dot_natural_key) if known else ():
            own = parameter_of(key) if is_packed(key) else key
            name, pattern = rename_source_key(own, renamings, converters, model.base_model_prefix, known)
            if name in known:
                self._keys.setdefault(name, []).append((key, pattern))

    def require(self, names: Collection[str]) -> None:
        """Check that the files have these parameters. Raises ModelError if one is missing."""
        if missing := sorted(set(names) - self._keys.keys()):
            raise ModelError(
                f"{self._reader.folder}: {len(missing)} of the model's projections of experts ({listed(missing)}) are "
                "not in these files, or under a name that transformers does not know. Restore the files, or use a "
                "checkpoint that transformers wrote"
            )

    def keys(self, name: str) -> list[str]:
        """Return the names of the tensors in the files that hold a parameter, without statistics of NF4."""
        return [key for key, _ in self._keys.get(name, ())]

    def in_nf4(self, name: str) -> bool:
        """Return True if the files have a parameter in NF4, or a part of it."""
        return any(key in self.packed for key in self.keys(name))

    def read(self, projection: str) -> Tensor:
        """Return the matrices [E, ...] of a projection that is not in NF4, as the model stores them."""
        places = self._keys[projection]
        pattern = places[0][1]
        if is_packed(places[0][0]):
            blocks, scales = sorted(key for key, _ in places)
            return dequantize(self._reader[blocks], self._reader[scales])
        if pattern is None:
            return self._reader[places[0][0]]
        converter = deepcopy(self._converters[pattern])
        tensors = self._reader.read(self.keys(projection))
        for key, own in places:
            converter.add_tensor(projection, key, own, tensors[key])
        try:
            found = converter.convert(projection, model=self._model, config=self._model.config)
        except (RuntimeError, ValueError) as error:  # matrices of different sizes or numbers
            raise ModelError(
                f"{self._reader.folder}: {projection}: its matrices do not fit together ({first_line(error)}). "
                "Download the model again"
            ) from error
        result: Tensor = found[projection]
        return result

    def quantized(
        self,
        projection: str,
        block_size: int,
        double_quant: bool,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> PackedStack:
        """Return a projection in NF4 on `device`: as the files have it, or quantized from its numbers in `dtype`.

        Raises:
            ModelError: the files have its experts in different forms of NF4, or in a layout that is not known, or
                other matrices than the model.
        """
        shape = self._shape(projection)
        if not self.in_nf4(projection):
            matrices = self.read(projection)
            self._require(why_another_weight(projection, matrices, shape))
            return quantize(matrices.to(device, dtype), block_size, double_quant)
        keys, parts = self._by_expert(projection)
        found = [key for key in keys if key in self.packed]
        weights = dict(zip(found, self.packed.read(found), strict=True))
        like = weights[found[0]].quant_state
        for key in keys:
            if key not in weights:  # excluded when the checkpoint was made
                matrix = self._reader[key]
                self._require(why_another_weight(key, matrix, like.shape))
                weights[key] = nf4.quantize(matrix.to(dtype), like.blocksize, like.nested)
        ordered = [weights[key] for key in keys]
        require_alike(ordered, f"{self._reader.folder}: {projection}")
        packed = stacked(ordered, parts)
        found_shape = packed.experts, parts * packed.shape[0], packed.shape[1]
        if found_shape != shape:
            self._require(
                f"{projection}: the files have {list(found_shape)} in 4 bits, the model needs {list(shape)}"
            )
        return packed.copied(device)

    def _shape(self, projection: str) -> tuple[int, ...]:
        """Return the shape that a projection has in the model, adapted or not."""
        owner, _, name = projection.rpartition(".")
        held: Any = getattr(self._model.get_submodule(owner), name)
        held = getattr(held, "base", held)
        return held.stored_shape if isinstance(held, ExpertStack) else tuple(held.shape)

    def _require(self, problem: str | None) -> None:
        if problem is not None:
            raise ModelError(f"{self._reader.folder}: {problem}. Download the model again")

    def norm(self, projection: str) -> float:
        """Return the Frobenius norm of all matrices of a projection."""
        if self.in_nf4(projection):
            matrices = self.quantized(projection, 64, True, torch.float32).dense(torch.float32)
        else:
            matrices = self.read(projection)
        return torch.linalg.vector_norm(matrices, dtype=torch.float64).item()

    def _by_expert(self, projection: str) -> tuple[list[str], int]:
        """Return the names of a projection's matrices, expert by expert, and the number of matrices an expert."""
        places = self._keys[projection]
        converter = self._converters.get(places[0][1] or "")
        patterns = [] if converter is None else converter.source_patterns
        by_part = [[key for key, own in places if own == pattern] for pattern in patterns]
        steps = [] if converter is None else converter.operations
        plain = [type(step) for step in steps] == [MergeModulelist, Concatenate][: max(1, len(patterns))]
        below = len(patterns) < 2 or (plain and steps[1].dim == 1)
        if not (plain and below and len({len(keys) for keys in by_part}) == 1):
            raise ModelError(
                f"{self._reader.folder}: {projection}: its matrices in NF4 have a layout that qlora does not know. Use "
                "the 16-bit version of the model; loading quantizes the experts too"
            )
        return [key for expert in zip(*by_part, strict=True) for key in expert], len(patterns)

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
