"""Weights in NF4 in a checkpoint's files, as bitsandbytes writes them.

<name>.weight           codes, two to a byte
<name>.weight.absmax, .quant_map, .quant_state.bitsandbytes__nf4        its statistics
<name>.weight.nested_absmax, .nested_quant_map                          with double quantization
"""

import re
from collections.abc import Sequence
from typing import Any

from qlora.errors import ModelError
from qlora.quantization import nf4
from qlora.storage.safetensors_files import ShardReader

STATISTICS = re.compile(
    r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__\w+)$"
)
"""ends of the names of tensors that belong to a quantized weight"""


class PackedWeights:
    """The weights in NF4 of a checkpoint, by the names of their codes.

    >>> packed = PackedWeights(ShardReader(folder))
    >>> if "model.layers.0.mlp.up_proj.weight" in packed: ...
    """

    def __init__(self, reader: ShardReader) -> None:
        self._reader = reader
        self.statistics: dict[str, list[str]] = {}
        """names of a weight's statistics, by the name of its codes"""
        for key in reader:
            if (found := STATISTICS.search(key)) is not None:
                self.statistics.setdefault(key[: found.start()], []).append(key)

    def __contains__(self, key: object) -> bool:
        return key in self.statistics

    def read(self, keys: Sequence[str]) -> list[nf4.Params4bit]:
        """Read weights by the names of their codes, to the CPU.

        Raises:
            ModelError: a part is missing, or a file cannot be read.
        """
        parts = {key: self.statistics[key] for key in keys}
        tensors = self._reader.read([name for key in keys for name in (key, *parts[key])])
        weights = []
        for key in keys:
            own = {name.removeprefix(key): tensors[name] for name in (key, *parts[key])}
            try:
                weights.append(nf4.from_tensors(own))
            except ModelError as error:
                raise ModelError(f"{self._reader.folder}: {key}: {error}") from error
        return weights


def require_alike(weights: Sequence[nf4.Params4bit], name: str) -> None:
    """Check that weights have one shape and were quantized in one way.

    Raises:
        ModelError: they differ; `name` says which they are.
    """
    states = [weight.quant_state for weight in weights]
    first = states[0]
    if not all(_form(state) == _form(first) and _same_tables(state, first) for state in states):
        raise ModelError(
            f"{name}: its matrices were quantized in different ways, which qlora does not read. Use the 16-bit version "
            "of the model; loading quantizes the experts too"
        )
    if first.quant_type != "nf4" or (first.nested and first.state2.blocksize != nf4.STATISTICS_BLOCK_SIZE):
        raise ModelError(
            f"{name}: it is in {first.quant_type}, or its statistics are in blocks of another size than "
            f"{nf4.STATISTICS_BLOCK_SIZE}, which qlora does not read. Use the 16-bit version of the model; loading "
            "quantizes the experts too"
        )


def _form(state: nf4.QuantState) -> tuple[Any, ...]:
    return (*state.shape, state.quant_type, state.blocksize, state.nested and state.state2.blocksize)


def _same_tables(one: nf4.QuantState, other: nf4.QuantState) -> bool:
    same: bool = one.code.equal(other.code)
    return same and (not one.nested or one.state2.code.equal(other.state2.code))
