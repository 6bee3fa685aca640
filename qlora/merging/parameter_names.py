"""Names of a model's parameters for the names in its files."""

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

PARTING = ("Chunk", "Split")
"""operations of transformers that part a tensor"""


class ParameterNames:
    """Names of a model's parameters for the names in its files, which can be older (as those of Gemma 3 are)."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = {name for name, _ in model.named_modules()}
        self._prefix = f"{model.base_model_prefix}."
        changes = get_model_conversion_mapping(model)
        self._renamings = [change for change in changes if isinstance(change, WeightRenaming)]
        self._parted = [change for change in changes if _parts_rows(change)]

    def module(self, key: str, suffix: str) -> str | None:
        """Return the module of the tensor `key`, with or without the decoder's prefix; None if there is none."""
        if not key.endswith(suffix):
            return None
        renamed, _ = rename_source_key(key, self._renamings, [])
        stems = [name.removesuffix(suffix) for name in (key, renamed)]
        candidates = (
            name for stem in stems for name in (stem, self._prefix + stem, stem.removeprefix(self._prefix))
        )
        return next((name for name in candidates if name in self._modules), None)

    def modules(self, key: str) -> list[str]:
        """Return the modules whose weights are the rows of the tensor `key`, one below the other; [] if there are none.

        So are the projections of attention in the files of HRM and Sarvam.
        """
        renamed, pattern = rename_source_key(key, self._renamings, self._parted)
        if pattern is None:
            return []
        targets = next(one.target_patterns for one in self._parted if pattern in one.source_patterns)
        found = [self.module(renamed.replace(targets[0], target, 1), ".weight") for target in targets]
        return [name for name in found if name is not None] if None not in found else []


def _parts_rows(change: object) -> bool:
    """Return True if a conversion of transformers parts the rows of one tensor among several."""
    return (
        isinstance(change, WeightConverter)
        and len(change.source_patterns) == 1
        and len(change.target_patterns) > 1
        and [(type(one).__name__ in PARTING, getattr(one, "dim", None)) for one in change.operations]
        == [(True, 0)]
    )
