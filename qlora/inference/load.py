"""Loading of a fine-tuned model (base, adapter and tokenizer) from the folder of a run or of an adapter."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from qlora.adapter.identity import BaseIdentity
from qlora.adapter.initial import InitialValues
from qlora.adapter.store import load_adapter
from qlora.data import Dataset, Prompts, held_out_batches, load_dataset, prompt_digests
from qlora.data.prompt_files import shared_system
from qlora.errors import ModelError
from qlora.model.decoder_layer import use_fused_layers
from qlora.model.load import load_base
from qlora.model.tokens import TrainedTokens
from qlora.objective import objective_of
from qlora.objective.checks import read_documents
from qlora.objective.step import evaluate
from qlora.recipe import Recipe
from qlora.runtime.device import device_named
from qlora.storage import manifest
from qlora.storage.manifest import MANIFEST, check_unchanged

_warn = logging.getLogger("qlora").warning


@dataclass(frozen=True)
class Trained:
    """A fine-tuned model, its tokenizer, and the recipe that it was trained with."""

    recipe: Recipe
    model: PreTrainedModel
    tokenizer: Any
    folder: Path
    """folder of the trained adapter or model"""
    system: str | None = None
    """system message that all training rows share; None if they share none"""

    @cached_property
    def prompts(self) -> Prompts:
        """Prompts as in the training rows, by default after the system message that all of these share."""
        return Prompts(self.recipe.data, self.tokenizer, self.system)

    @property
    def identity(self) -> BaseIdentity:
        """Fingerprint of base, tokenizer and template, which an adapter of this model must match."""
        return replace(BaseIdentity.of(self.model), **prompt_digests(self.recipe.data, self.tokenizer))


def load_trained(
    folder: str | Path,
    *,
    device: str = "auto",
    with_adapter: bool = True,
    prepared: bool = False,
    any_base: bool = False,
    trust_remote_code: bool = False,
) -> Trained:
    """Load the fine-tuned model of the run or adapter in `folder`, in evaluation mode.

    Args:
        folder: folder of a run or of an adapter.
        device: auto, cpu, cuda or cuda:N.
        with_adapter: False loads the base alone, with tokens that were trained as they were before.
        prepared: change the base as the adapter's initialisation did (PiSSA), also without the adapter.
        any_base: accept a base, tokenizer or template that is not the one from training.
        trust_remote_code: allow the base to run its own code, if the recipe asks for it.

    Raises:
        ModelError: the folder has no trained result; the base, tokenizer or template has changed since training; or
            the base would run its own code.
    """
    adapter = find_trained(Path(folder))
    recipe = recipe_of(adapter, trust_remote_code=trust_remote_code)
    base = recipe.base
    if with_adapter and not recipe.adapter.facts.frozen_base:
        base = base.model_copy(update={"model": str(adapter), "init": "pretrained"})
    initial = InitialValues.stored(adapter) if with_adapter or prepared else None
    if initial is not None and initial.changed is None:
        initial = None  # the base is the ordinary one
    model = load_base(base, device_named(device), seed=recipe.training.seed, initial=initial)
    tokens = TrainedTokens.of(recipe)
    if recipe.adapter.train_tokens:  # the base alone has the tokens too, as they were before training
        tokens.train(model)
        model.requires_grad_(False)
    trained = Trained(recipe, model.eval(), tokens.tokenizer, adapter, shared_system(adapter))
    if with_adapter and recipe.adapter.facts.frozen_base:
        load_adapter(model, adapter, base=trained.identity, any_base=any_base)
        model.eval()
    return trained


def recipe_of(result: Path, changes: Sequence[str] = (), *, trust_remote_code: bool = False) -> Recipe:
    """Read the recipe of a trained adapter or model, with `changes` (`section.key=value`), in order to load its base.

    All loading by such a recipe must use this function. The folder can come from a stranger, so its recipe must not
    decide whether the base's own code runs.

    Raises:
        ModelError: the base would run its own code, and `trust_remote_code` does not allow it.
    """
    file = result / "recipe.yaml"
    recipe = Recipe.recorded(file, changes)
    if recipe.base.trust_remote_code and not trust_remote_code:
        raise ModelError(
            f"{file}: would run code from {recipe.base.model} (base.trust_remote_code: true), and a recipe stored "
            "with results cannot allow that. Read the code; if you trust it, add --trust-remote-code (in Python: "
            "trust_remote_code=True)"
        )
    return recipe


def find_trained(folder: Path) -> Path:
    """Return the folder of the trained result: in a run's folder, or `folder` itself. Raises ModelError if none."""
    for place in (folder, folder / "adapter", folder / "model"):
        weights = any((place / name).is_file() for name in ("adapter_config.json", "config.json"))
        recipe = (place / "recipe.yaml").is_file()
        if weights or recipe:
            check_unchanged(place)
        if weights and recipe:
            return place
    if (folder / "recipe.yaml").is_file():
        raise ModelError(f"{folder}: the run is unfinished; resume it with `qlora train RECIPE --resume`")
    raise ModelError(
        f"{folder}: no trained adapter here. Give the folder of a run, or the folder adapter/ in it"
    )


def held_out_loss(trained: Trained) -> tuple[float, int]:
    """Return the mean loss (nats per supervised token) on the recipe's held-out rows, and the number of these tokens.

    The loss equals the one that the run printed.
    """
    dataset = load_dataset(trained.recipe.data, trained.tokenizer, trained.recipe.training.seed)
    warn_of_other_rows(trained.folder, trained.recipe, dataset)
    return loss_on(trained, dataset, trained.recipe)


def loss_on(trained: Trained, dataset: Dataset, recipe: Recipe) -> tuple[float, int]:
    """Return the mean loss (nats per supervised token) on the held-out rows of a data set, and the number of tokens.

    The model gets the layers and the attention of training.

    Args:
        trained: the model.
        dataset: rows as the model's tokens.
        recipe: the recipe with the `data` section of these rows.
    """
    read_documents(trained.model, recipe)
    if recipe.adapter.facts.frozen_base:
        use_fused_layers(trained.model.requires_grad_(False))
    batches = held_out_batches(dataset, recipe)
    total, tokens = evaluate(trained.model, batches, objective_of(recipe))
    return total.sum.item() / tokens, tokens


def warn_of_other_rows(result: Path, recipe: Recipe, dataset: Dataset) -> None:
    """Warn if the recipe's data are not those of the training: the held-out rows are drawn again from the new ones."""
    if not (result / MANIFEST).is_file():
        return
    fingerprint = manifest.read(result).get("data")  # None in a result of an earlier version
    if fingerprint not in (None, dataset.fingerprint):
        _warn(
            f"{recipe.data.names}: the rows are not those of the training, so rows that were trained on can be held "
            "out now"
        )
