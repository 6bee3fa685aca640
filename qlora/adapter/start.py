"""Start of a run from an adapter of an earlier run, or of PEFT, in place of a new one (`adapter.from`).

The run gets the adapter's layers with their ranks and alphas, then its numbers. What it trains is again one adapter: it
can have been trained on other data, and on a base in another precision.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from torch import nn

from qlora.adapter.adapted_layer import AdaptedLayer
from qlora.adapter.config import CONFIG_FILE
from qlora.adapter.identity import BaseIdentity
from qlora.adapter.methods import METHODS, AdapterMethod
from qlora.adapter.peft_experts import layer_name, targets_of
from qlora.adapter.peft_tensors import PREFIX, TENSORS_FILE
from qlora.adapter.store import add_layers, check_shapes, config_and_method, load_adapter
from qlora.adapter.trained_parts import MODULES, TOKENS
from qlora.errors import ModelError, RecipeError, listed
from qlora.storage.manifest import check_unchanged
from qlora.storage.safetensors_files import stored_tensors


def find_adapter(folder: Path) -> Path:
    """Return the folder of the adapter (ours or PEFT's): in a run, or `folder` itself. Raises ModelError if none."""
    for place in (folder, folder / "adapter"):
        check_unchanged(place)
        if (place / CONFIG_FILE).is_file():
            return place
    unfinished = " (the run is unfinished)" if (folder / "run.json").is_file() else ""
    raise ModelError(
        f"{folder}: no adapter here{unfinished}. Give the folder of a run, or a folder with an {CONFIG_FILE}"
    )


@dataclass(frozen=True)
class StartAdapter:
    """An adapter that a run starts from."""

    folder: Path
    config: Mapping[str, Any]
    """fields of its adapter_config.json"""
    method: AdapterMethod
    shapes: Mapping[str, Mapping[str, Any]]
    """layer -> suffix -> tensor with a shape, of which only the header was read"""

    @classmethod
    def read(cls, folder: Path, model: nn.Module, method: str) -> Self:
        """Read the config and the shapes of an adapter that continues on `model`.

        Args:
            folder: folder of a run or of an adapter.
            model: the base, also on the meta device.
            method: `adapter.method` of the recipe.

        Raises:
            RecipeError: the adapter is one of another method.
            ModelError: there is no adapter, or it is damaged or not supported.
        """
        try:
            folder = find_adapter(folder)
        except ModelError as error:
            raise ModelError(f"adapter.from: {error}") from error
        config, own = config_and_method(folder, model)
        if own is not METHODS[method]:
            raise RecipeError(
                f"adapter.method: {folder} is an adapter of {own.name}, so set it to {own.name}"
            )
        suffixes = [suffix for kind in own.layers for suffix in kind.SAVED]
        shapes: dict[str, dict[str, Any]] = {}
        experts = targets_of(config)
        for tensor in stored_tensors(folder / TENSORS_FILE):
            suffix = next((suffix for suffix in suffixes if tensor.name.endswith(suffix)), None)
            if suffix is not None:
                name = layer_name(tensor.name.removesuffix(suffix).removeprefix(PREFIX), experts)
                shapes.setdefault(name, {})[suffix] = tensor
        return cls(folder, config, own, shapes)

    def check_beside(self, tokens: Sequence[str], modules: Sequence[str]) -> None:
        """Raise RecipeError if the recipe trains other tokens or modules beside the adapter than it has."""
        if modules:
            raise RecipeError(
                f"adapter.train_modules: {self.folder} brings the modules that are trained beside it "
                f"({listed(self.modules) if self.modules else 'it has none'}); leave this key out"
            )
        if bool(tokens) != bool(self.config.get(TOKENS)):
            raise RecipeError(
                f"adapter.train_tokens: {self.folder} has no tokens that were trained beside it; leave this key out"
                if tokens
                else f"adapter.train_tokens: {self.folder} has rows of tokens that were trained beside it; name the "
                "same tokens here, as the recipe of its run does"
            )

    @property
    def modules(self) -> list[str]:
        """Modules that were trained as a whole beside the adapter, as PEFT names them."""
        return list(self.config.get(MODULES) or [])

    def add_layers(self, model: nn.Module, dropout: float, *, part: bool = False) -> None:
        """Adapt `model` with new layers of the same ranks and alphas, in place.

        Args:
            model: a base without an adapter, also on the meta device.
            dropout: dropout of the run, in place of the adapter's own.
            part: True if `model` has a part of the base's layers only, as in a forecast.

        Raises:
            ModelError: the layers or their shapes are not those of the model.
        """
        if not self.shapes:
            raise ModelError(f"adapter.from: {self.folder} has no layers. Use another adapter")
        present = {name: module for name, module in model.named_modules() if name in self.shapes}
        absent = sorted(self.shapes.keys() - present.keys())
        if not present or (absent and not part):
            raise ModelError(
                f"{self.folder}: the adapter has {listed(absent)}, and this base has no such layers. Continue it on "
                "the base that it was trained on"
            )
        specs = {}
        for name, module in present.items():
            spec = self.method.spec(self.config, name, self.folder / CONFIG_FILE)
            check_shapes(name, module, self.shapes[name], self.method, spec, self.folder / TENSORS_FILE)
            specs[name] = replace(spec, dropout=dropout) if hasattr(spec, "dropout") else spec
        add_layers(model, self.method, specs)

    def check_base(self, base: BaseIdentity) -> list[str]:
        """Check that the adapter was trained on this base, and return remarks on what else differs.

        base: fingerprint of the run's base, with the digests of its tokenizer and template.

        Raises:
            ModelError: it was trained on another base.
        """
        recorded = BaseIdentity.read(self.folder) or BaseIdentity(self.config.get("base_model_name_or_path"))
        # The update applies to the base in any precision, and the run can read other rows in another way
        weights = replace(recorded, quantization=None, tokenizer=None, template=None)
        if (difference := weights.difference(base)) is not None:
            raise ModelError(
                f"adapter.from: {self.folder} was trained on {recorded}, and base.model is {base}; they differ in "
                f"{difference}. Use the base that it was trained on"
            )
        return list(_differences(recorded, base))

    def load(self, model: nn.Module) -> list[str]:
        """Copy the adapter's numbers into a model with its layers, and return remarks on them.

        model: the base after `add_layers`, with the tokens and modules that the run trains beside.

        Raises:
            ModelError: a tensor does not fit.
        """
        layers = AdaptedLayer.of(model)
        specs = {name: layer.spec for name, layer in layers.items()}
        load_adapter(model, self.folder, any_base=True)
        for name, layer in layers.items():
            theirs, layer.spec = layer.spec, specs[name]  # the run has its own dropout
        return [
            f"continues {self.folder}: {self._summary(layers)}{self._rounding(layers)}",
            *_other_dropout(theirs, layer.spec),
        ]

    def _summary(self, layers: Mapping[str, AdaptedLayer]) -> str:
        """Describe the layers: their number and their ranks."""
        ranks = sorted({layer.spec.rank for layer in layers.values() if hasattr(layer.spec, "rank")})
        words = "" if not ranks else f", rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "")
        return f"{len(layers)} layers of {self.method.name}{words}"

    def _rounding(self, layers: Mapping[str, AdaptedLayer]) -> str:
        """Say by how much the numbers changed if the run holds them in a narrower dtype; else return nothing."""
        error = norm = 0.0
        names = set()
        for name, layer in layers.items():
            for suffix, parameter in layer.saved().items():
                stored = self.shapes[name][suffix].read().double()
                error += (stored - parameter.detach().cpu()).square().sum().item()
                norm += stored.square().sum().item()
                names.add(str(parameter.dtype).removeprefix("torch."))
        if not error:
            return ""
        return f"; rounded to {' and '.join(sorted(names))}, they change by {math.sqrt(error / norm):.2%} of their norm"


def _differences(recorded: BaseIdentity, own: BaseIdentity) -> Iterator[str]:
    """Say what differs from the training of the adapter: the precision of the base, the tokenizer, the template."""
    if recorded.weights is None:
        named = f"only the name of its base, {recorded.name}" if recorded.name else "nothing about its base"
        yield f"the adapter records {named}, so the weights of both bases cannot be compared"
    if None not in (recorded.quantization, own.quantization) and recorded.quantization != own.quantization:
        yield f"the adapter was trained on a base in another precision: {recorded.quantization}, now {own.quantization}"
    for key in ("tokenizer", "template"):
        theirs, ours = getattr(recorded, key), getattr(own, key)
        if None not in (theirs, ours) and theirs != ours:
            yield f"the adapter was trained with another {key}, so the run has to unlearn that one"


def _other_dropout(theirs: Any, ours: Any) -> Iterator[str]:
    if getattr(theirs, "dropout", 0.0) != getattr(ours, "dropout", 0.0):
        yield f"adapter.dropout is {ours.dropout:g}; the adapter was trained with {theirs.dropout:g}"
