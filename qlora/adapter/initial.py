"""Initial A and B taken from the base's 16-bit weights while they are read: PiSSA and LoftQ; s is LoRA's scaling.

    pissa   s B A = U_r S_r V_r^T, the principal part of the weight W (Meng et al. 2024, equations 2 to 4). The base
            becomes W - s B A, which is then quantized if the recipe says so
    loftq   s B A = the best approximation of rank r of W - Q, where Q is the dequantized NF4 form of W (Li et al. 2023,
            algorithm 1, one step). The base is the ordinary NF4 base

Both split the singular values evenly between A and B. W has the dtype in which it is quantized.

    adapter_initial.safetensors   A and B before the first step, under their names in adapter_model.safetensors

The file lies beside the adapter in every checkpoint. With it the base of PiSSA is made again, and what was learned is
told apart from the start, without a decomposition, which could have other last bits on another machine.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.functional import pad

from qlora.adapter.adapted_layer import AdaptedLayer
from qlora.adapter.algebra.low_rank import principal
from qlora.adapter.config import CONFIG_FILE, INITIAL_FILE, read_fields, spec_of_layer
from qlora.adapter.digest import digest
from qlora.adapter.identity import BaseIdentity
from qlora.adapter.lora_spec import FROM_WEIGHTS, LoraSpec
from qlora.adapter.peft_tensors import PREFIX, SUFFIX_A, SUFFIX_B, named_tensors
from qlora.adapter.targets import is_conv1d, linear_names, select
from qlora.adapter.trained_parts import targets_beside
from qlora.errors import ModelError
from qlora.quantization.nf4 import is_nf4
from qlora.runtime.seeds import fold_seed, key_of
from qlora.storage import atomic, regular_file, tensor_file

ORIGIN = "origin"
"""Key of the file's metadata: a JSON object with the initialisation and the distances"""


class Initial(NamedTuple):
    """A and B of one layer before the first step, on the CPU."""

    init: str
    """initialisation that made them, pissa or loftq"""
    a: Tensor
    """[rank, in]"""
    b: Tensor
    """[out, rank]"""
    scaling: float

    def update(self, like: Tensor) -> Tensor:
        """Return scaling * B A [out, in], on the device of `like` and in its dtype."""
        return self.scaling * (self.b.to(like) @ self.a.to(like))

    @property
    def changes_base(self) -> bool:
        """True if this update was taken out of the base."""
        return self.init == "pissa"

    def left_in_base(self, weight: Tensor) -> Tensor:
        """Return what the base keeps of a weight [out, in], in the dtype of the weight."""
        return (_wide(weight) - self.update(_wide(weight))).to(weight.dtype) if self.changes_base else weight


@dataclass
class Distances:
    """Distances from the 16-bit base at the start, as squared Frobenius norms over all targets."""

    weights: float = 0.0
    """of W itself"""
    without: float = 0.0
    """of W - the base that other initialisations have"""
    start: float = 0.0
    """of W - (base + s B A)"""
    converted: float = 0.0
    """of the base that other initialisations have - (base + s B A): the error of a conversion to that base"""

    def add(self, weight: Tensor, ordinary: Tensor, start: Tensor) -> None:
        """Add one layer: W, the base that other initialisations have, and base + s B A."""
        self.weights += weight.square().sum().item()
        self.without += (weight - ordinary).square().sum().item()
        self.start += (weight - start).square().sum().item()
        self.converted += (ordinary - start).square().sum().item()

    def as_json(self) -> dict[str, float]:
        """Return the distances relative to the norm of the weights."""
        of = self.weights or 1.0
        squares = {"without": self.without, "start": self.start, "converted": self.converted}
        return {name: math.sqrt(square / of) for name, square in squares.items()}


@dataclass
class InitialValues:
    """Takes the initial A and B of the targets from their weights; `load_base` calls it while it reads the weights."""

    spec: LoraSpec
    """settings with their targets; `init` is pissa or loftq"""
    seed: int = 0
    """seed of the sketches of large weights"""
    layers: dict[str, Initial] = field(default_factory=dict)
    """values by layer; those that are here already are used instead of new ones"""
    distances: Distances | None = field(default_factory=Distances)
    """None: not measured"""
    names: frozenset[str] = frozenset()
    """the targets, once they are chosen"""
    beside: Sequence[str] = ()
    """modules trained as a whole, which are no targets"""

    @classmethod
    def of(cls, model: nn.Module) -> Self | None:
        """Return the initial values that belong to the adapter of `model`; None if it starts at the base."""
        found = getattr(model, "initial_values", None)
        return found if isinstance(found, cls) else None

    @classmethod
    def stored(cls, folder: Path, *, measured: bool = False) -> Self | None:
        """Read the initial values of the adapter in `folder`; None if it has none.

        Args:
            folder: the adapter folder.
            measured: measure the distances from the 16-bit base again.

        Raises:
            ModelError: a file is damaged.
        """
        file = folder / INITIAL_FILE
        if not file.is_file():
            return None
        origin, tensors = _read(file)
        init = origin.get("init")
        if init not in FROM_WEIGHTS:
            raise ModelError(f"{file}: does not say where its values come from. Restore the file")
        config, layers = read_fields(folder / CONFIG_FILE), {}
        for key, a in tensors.items():
            if key.endswith(SUFFIX_A):
                name = key.removeprefix(PREFIX).removesuffix(SUFFIX_A)
                b = tensors.get(f"{PREFIX}{name}{SUFFIX_B}")
                if b is None or a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
                    raise ModelError(f"{file}: A and B of {name} do not fit each other. Restore the file")
                layers[name] = Initial(init, a, b, spec_of_layer(config, name, folder / CONFIG_FILE).factor)
        if not layers:
            raise ModelError(f"{file}: holds no initial values. Restore the file")
        return cls(LoraSpec(init=init), layers=layers, distances=Distances() if measured else None)

    def choose(self, model: nn.Module) -> None:
        """Find the targets in `model`, which can be on the meta device."""
        targets = targets_beside(model, self.spec.targets, () if self.layers else self.beside)
        self.names = frozenset(self.layers or select(model, targets))

    def __call__(self, name: str, weight: Tensor, stored: Callable[[Tensor], Tensor]) -> Tensor:
        """Return what the base keeps of a weight.

        Args:
            name: name of the layer; a layer that is no target keeps its weight.
            weight: the weight [out, in] before quantization.
            stored: returns the values of a weight after it is stored, that is dequantized if the base is in NF4.
        """
        if name not in self.names:
            return weight
        wide = _wide(weight)
        ordinary = stored(weight).to(wide)
        if name not in self.layers:
            spec = self.spec.for_layer(name)
            random = torch.Generator().manual_seed(fold_seed(self.seed, key_of(name)))
            matrix = wide if spec.init == "pissa" else wide - ordinary
            if not matrix.any():  # A and B would be zero, and so would their gradients
                empty = "weight" if spec.init == "pissa" else "error of NF4 (the layer is not in NF4)"
                raise ModelError(
                    f"init {spec.init} finds no {empty} in {name} to start from. Leave the layer out of the "
                    "targets, or use another init"
                )
            best = principal(matrix / spec.factor, spec.rank, random)
            missing = spec.rank - best.rank  # a rank above the smaller side of the weight
            a, b = pad(best.a, (0, 0, 0, missing)), pad(best.b, (0, missing))
            self.layers[name] = Initial(
                spec.init, a.to("cpu", spec.dtype), b.to("cpu", spec.dtype), spec.factor
            )
        initial = self.layers[name]
        kept = initial.left_in_base(weight)
        if self.distances is not None:
            base = stored(kept).to(wide) if initial.changes_base else ordinary
            self.distances.add(wide, ordinary, base + initial.update(wide))
        return kept

    def read(self, model: nn.Module) -> None:
        """Call this object for the plain linear weights of a model in memory, and change them in place.

        Raises:
            ModelError: a weight that changes is shared with another module. No weight has changed.
        """
        targets = {name: model.get_submodule(name) for name in linear_names(model) if name in self.names}
        plain = {
            name: linear for name, linear in targets.items() if not is_nf4(linear)
        }  # others were read before
        if self.spec.init == "pissa":
            for name in plain:
                _require_own(model, name)
        for name, linear in plain.items():
            weight = _weight(linear)
            weight.copy_(self(name, weight, lambda values: values))

    @property
    def digest(self) -> str:
        """Digest of all values."""
        return digest(_bytes(self.layers))

    @property
    def changed(self) -> str | None:
        """Name of the change to the base, with a digest of its numbers; None if the base is unchanged."""
        changes = any(initial.changes_base for initial in self.layers.values())
        return f"{self.spec.init} {self.digest}" if changes else None

    @property
    def note(self) -> str:
        """Remark for the user on the start of the training."""
        if not self.layers or self.distances is None:
            return (
                f"init {self.spec.init} has no effect on a synthetic base, whose weights are random: A is drawn as by "
                "kaiming, and B is zero"
            )
        found = {name: f"{value:.2%}" for name, value in self.distances.as_json().items()}
        return (
            f"{self.spec.init}: base and adapter start {found['start']} away from the targets' 16-bit weights, "
            f"relative to their norm; with another init they start {found['without']} away"
        )

    def fill(self, layers: Mapping[str, Any]) -> None:
        """Copy the values to the parameters `lora_a` and `lora_b` of adapted layers, by name."""
        with torch.no_grad():
            for name, initial in self.layers.items():
                layers[name].lora_a.copy_(initial.a)
                layers[name].lora_b.copy_(initial.b)


def start_values(model: nn.Module, spec: LoraSpec, seed: int) -> InitialValues | None:
    """Return the initial values that were taken while `model` was loaded, or take them now from its plain weights.

    The weights change in place if the initialisation changes them, and so does the model's fingerprint. None if the
    initialisation of `spec` starts at the base.

    Raises:
        ModelError: a target is in NF4, and its 16-bit weight was not read; an initialisation for NF4 finds none; or the
            base was changed for another adapter.
    """
    values = InitialValues.of(model)
    if spec.init not in FROM_WEIGHTS:
        if values is not None and values.changed is not None:
            raise ModelError(
                f"the weights of this model were changed for an adapter of {values.spec.init}: load the base again"
            )
        model.initial_values = None  # type: ignore[assignment]
        return None
    if values is not None:
        return values
    values = InitialValues(spec, seed)
    values.choose(model)
    targets = {name: model.get_submodule(name) for name in values.names}
    if any(_weight(linear).is_meta for linear in targets.values()):
        return values  # there is nothing to read, as in a forecast
    if packed := sorted(name for name, linear in targets.items() if is_nf4(linear)):
        raise ModelError(
            f"init {spec.init} reads 16-bit weights, and {packed[0]} is in NF4 already. Train with a recipe "
            "(adapter.init), which reads the weights before it quantizes them, or use another init"
        )
    if spec.init == "loftq":
        raise ModelError("init loftq corrects the error of NF4, and no target is in NF4. Use another init")
    base = BaseIdentity.of(model)  # of the weights before the change
    values.read(model)
    model.base_identity = replace(base, changed=values.changed)  # type: ignore[assignment]
    model.initial_values = values  # type: ignore[assignment]
    return values


def require_16_bit(model: nn.Module, values: InitialValues | None, folder: Path) -> None:
    """Raise ModelError if the adapter in `folder` needs a changed base, and `model` is in NF4 without the change."""
    if values is None or values.changed is None:
        return
    values.choose(model)
    linears = [model.get_submodule(name) for name in values.names & set(linear_names(model))]
    if any(map(is_nf4, linears)) and BaseIdentity.of(model).changed is None:
        raise ModelError(
            f"{folder}: the adapter was trained on a base without the initial update of {values.spec.init}, which must "
            "be taken out before the base is quantized. Load both with load_trained, or convert the adapter to the "
            f"unchanged base: qlora adapter export {folder} --to DIR"
        )


def prepared_base(base: BaseIdentity, values: InitialValues | None) -> BaseIdentity:
    """Return the fingerprint that a model with the fingerprint `base` has after `prepare_base`."""
    return base if values is None or base.changed is not None else replace(base, changed=values.changed)


def prepare_base(model: nn.Module, values: InitialValues | None) -> None:
    """Make a model without an adapter the base that belongs to the initial values, and attach these to it.

    A model with an adapter, whose place another one takes, keeps its base; and equal values, with their distances.
    """
    own, adapted = InitialValues.of(model), bool(AdaptedLayer.of(model))
    if adapted and own is not None and values is not None and own.digest == values.digest:
        return
    if not adapted and values is not None and values.changed is not None:
        base = BaseIdentity.of(model)  # of the weights before the change
        if base.changed is None:
            values.read(model)
            model.base_identity = replace(base, changed=values.changed)  # type: ignore[assignment]
    model.initial_values = values  # type: ignore[assignment]


def require_own_base(model: nn.Module, base: BaseIdentity) -> None:
    """Raise ModelError if the base was changed, and not by the initial values of the adapter: none could load it."""
    values = InitialValues.of(model)
    if base.changed != (None if values is None else values.changed):
        raise ModelError(
            "the adapter cannot be saved: another adapter changed the base under it, or its own change was not made. "
            "Load the adapter into the base that it was trained on"
        )


def write_initial(model: nn.Module, folder: Path) -> None:
    """Write the initial values of `model` beside its adapter in `folder`, or remove those of an earlier adapter.

    Raises:
        OSError, SafetensorError: the file cannot be written.
    """
    values, file = InitialValues.of(model), folder / INITIAL_FILE
    if values is None or not values.layers:
        file.unlink(missing_ok=True)
        return
    named = named_tensors({name: {SUFFIX_A: x.a, SUFFIX_B: x.b} for name, x in values.layers.items()})
    origin = {"init": values.spec.init, "distances": values.distances and values.distances.as_json()}
    with atomic.replacing(file) as draft:
        # one key, because safetensors writes several in random order
        tensor_file.write(draft, named, {ORIGIN: json.dumps(origin)})


def stored_distances(folder: Path) -> dict[str, float]:
    """Return the distances measured at the start of the adapter in `folder`; empty if unknown."""
    origin, _ = _read(folder / INITIAL_FILE)
    return origin.get("distances") or {}


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return where the values in a file come from, and its tensors by name."""
    try:
        regular_file.check(file)
        with safe_open(file, "pt") as opened:
            origin = json.loads((opened.metadata() or {}).get(ORIGIN, "{}"))
            return origin, {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read: {error}. Restore the file") from error


def _bytes(layers: dict[str, Initial]) -> Iterator[bytes]:
    for name, initial in sorted(layers.items()):
        yield f"{name} {initial.scaling!r}".encode()
        for tensor in (initial.a, initial.b):
            yield tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def _weight(linear: nn.Module) -> Tensor:
    """Return the weight of a linear layer [out, in], or its packed codes."""
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return weight.data.T if is_conv1d(linear) else weight.data


def _wide(weight: Tensor) -> Tensor:
    return weight if weight.dtype == torch.float64 else weight.float()


def _require_own(model: nn.Module, name: str) -> None:
    """Raise ModelError if another module shares the weight of the layer `name`."""
    weight = model.get_submodule(name).weight
    others = [other for other, module in model.named_modules() if module._parameters.get("weight") is weight]
    if shared := [other for other in others if other != name]:
        raise ModelError(
            f"init pissa changes the weight of {name}, which {shared[0]} shares: leave it out of the targets, or use "
            "another init"
        )
