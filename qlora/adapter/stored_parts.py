"""Trained parts of an adapter folder: found in a model as PEFT finds them, checked, and put into the model."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora.adapter.adapted_layer import AdaptedLayer
from qlora.adapter.peft_tensors import PREFIX
from qlora.adapter.trained_parts import DELTA, MARK, MODULES, TOKENS, owners_in, state_of, trained_parts
from qlora.adapter.trained_rows import TrainedRows, check_rows, embedding_and_head, place_rows, plain
from qlora.adapter.wrap import replace_modules
from qlora.errors import ModelError, UsageError


@dataclass(frozen=True)
class StoredParts:
    """Trained parts that an adapter_config.json names, found in a model."""

    rows: Mapping[str, tuple[list[int], str]]
    """module -> token ids, and the name of the tensor with their rows; tied modules share it"""
    modules: Sequence[str]
    """modules trained as a whole, with their submodules"""
    shapes: Mapping[str, tuple[int, ...]]
    """shapes of the tensors by their names in the file"""

    @classmethod
    def find(cls, model: nn.Module, config: Mapping[str, Any], file: Path) -> "StoredParts":
        """Find the parts that `config`, read from `file`, names in `model`, as PEFT finds them.

        Raises:
            ModelError: the model has no such module, or its rows cannot be replaced.
        """
        rows = _rows_in(model, config.get(TOKENS), file)
        modules = _modules_in(model, config.get(MODULES))
        shapes: dict[str, tuple[int, ...]] = {}
        for name, (ids, key) in rows.items():
            check_rows(model, name, ids)
            weight: Any = plain(model.get_submodule(name)).weight
            shapes[key] = (len(ids), weight.shape[1])
        for name in modules:
            for inner, module in owners_in(model, name).items():
                shapes |= {f"{PREFIX}{inner}.{key}": tuple(t.shape) for key, t in state_of(module).items()}
        return cls(rows, modules, shapes)

    def without(self, names: Sequence[str]) -> list[str]:
        """Leave out the layers inside modules that are trained as a whole: like PEFT, they get no adapter."""
        return [
            name for name in names if not any(f"{name}.".startswith(f"{whole}.") for whole in self.modules)
        ]

    def check(self, model: nn.Module, tensors: Mapping[str, Tensor], file: Path) -> None:
        """Raise ModelError if a tensor, read from `file`, does not fit, or an adapted model has other parts."""
        own = trained_parts(model).keys() if AdaptedLayer.of(model) else self.shapes.keys()
        ids = {name: list(module.ids) for name, module in TrainedRows.of(model).items()}
        given = {name: ids for name, (ids, _) in self.rows.items()}
        if own != self.shapes.keys() or (AdaptedLayer.of(model) and ids != given):
            raise ModelError(
                f"{file}: this adapter has other tokens or modules trained beside it than the model. Load it into a "
                "model without an adapter"
            )
        for key, shape in self.shapes.items():
            if tuple(tensors[key].shape) != shape:
                raise ModelError(
                    f"{file}: {key} is {list(tensors[key].shape)}, the model needs {list(shape)}. Load the base that "
                    "the adapter was trained on"
                )

    def load(self, model: nn.Module, tensors: Mapping[str, Tensor], *, in_place: bool) -> None:
        """Copy the parts into those of an adapted model, or put them into a base, whose own modules stay unchanged."""
        if in_place:
            with torch.no_grad():
                for name, tensor in trained_parts(model).items():
                    tensor.copy_(tensors[name])
            return
        memo: dict[int, Any] = {}  # so that weights that are tied stay tied
        originals = [model.get_submodule(name) for name in self.modules]
        replace_modules(model, {original: copy.deepcopy(original, memo) for original in originals})
        assigned: dict[Tensor, tuple[Tensor, nn.Parameter]] = {}
        for name in self.modules:
            for inner, module in owners_in(model, name).items():
                setattr(module, MARK, True)
                for key, own in state_of(module).items():
                    stored = tensors[f"{PREFIX}{inner}.{key}"]
                    tied = assigned.get(own)
                    if tied is not None and torch.equal(tied[0], stored):
                        setattr(module, key, tied[1])
                        continue
                    content = stored.to("cpu" if own.is_meta else own.device, own.dtype)
                    if isinstance(own, nn.Parameter):
                        assigned[own] = stored, nn.Parameter(content)
                        setattr(module, key, assigned[own][1])
                    else:
                        module.register_buffer(key, content)
        values = {
            key: nn.Parameter(_beside(model, name, tensors[key])) for name, (_, key) in self.rows.items()
        }
        place_rows(model, {name: (ids, values[key]) for name, (ids, key) in self.rows.items()})


def _beside(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """Return a tensor on the device of the module `name`; on the CPU beside one without content."""
    base: Any = plain(model.get_submodule(name))
    device = getattr(base, "device", base.weight.device)
    return tensor.to("cpu" if device.type == "meta" else device)


def _rows_in(model: nn.Module, field: Any, file: Path) -> dict[str, tuple[list[int], str]]:
    """Return the modules with trained rows, their token ids and their tensors' names, chosen as in PEFT."""
    if not field:
        return {}
    try:
        embedding, head = embedding_and_head(model)
    except UsageError as error:
        raise ModelError(f"{file}: {error}") from error
    wanted = field if isinstance(field, dict) else {embedding: field}
    found: dict[str, tuple[list[int], str]] = {}
    for ending, ids in wanted.items():
        names = [name for name in (embedding, head) if name is not None and name.endswith(ending)]
        if not names:
            raise ModelError(
                f"{file}: {TOKENS} names {ending}, which is neither the input embedding nor the output head of this "
                "model. Load the base that it was trained on"
            )
        found |= {name: (list(ids), PREFIX + name + DELTA) for name in names}
    if head is not None and embedding in found:
        weights = [plain(model.get_submodule(name)).weight for name in (embedding, head)]
        tied = weights[0] is weights[1]
        if tied and found.get(head, found[embedding])[0] == found[embedding][0]:
            found[head] = found[embedding]
    return found


def _modules_in(model: nn.Module, field: Sequence[str] | None) -> list[str]:
    """Return the modules trained as a whole, chosen as in PEFT: by the end of their name; without those inside another.

    An entry can match nothing: PEFT names `classifier` and `score` for every sequence classifier.
    """
    if not field:
        return []
    names = [name for name, _ in model.named_modules() if name and name.endswith(tuple(field))]
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]
