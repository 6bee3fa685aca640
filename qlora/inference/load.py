"""A fine-tuned model, found again: from a run's or an adapter's folder to base, adapter and tokenizer."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from qlora.adapter.identity import BaseIdentity
from qlora.adapter.store import load_adapter
from qlora.data import held_out_batches, load_dataset, prompting
from qlora.errors import ModelError
from qlora.model.decoder_layer import use_fused_layers
from qlora.model.load import load_base, load_tokenizer
from qlora.objective import objective_of
from qlora.objective.checks import read_documents_if_apart
from qlora.objective.step import evaluate
from qlora.recipe import Recipe
from qlora.runtime.device import device_named


@dataclass(frozen=True)
class Trained:
    """A base with its adapter, and the recipe that made it."""

    recipe: Recipe
    model: PreTrainedModel
    tokenizer: Any

    @property
    def identity(self) -> BaseIdentity:
        """What an adapter that is put into the model must have been trained on."""
        return replace(BaseIdentity.of(self.model), **prompting(self.recipe.data, self.tokenizer))


def load_trained(
    folder: str | Path,
    *,
    device: str = "auto",
    with_adapter: bool = True,
    any_base: bool = False,
    trust_remote_code: bool = False,
) -> Trained:
    """The model that the run or adapter in `folder` stands for, on `device`, in evaluation mode.

    `with_adapter=False` loads its base alone. Raises ModelError if there is no such result; if the base,
    tokenizer or template that its recipe names is not what it was trained on any more, unless `any_base`; or if
    the base would run code of its own, unless `trust_remote_code`.
    """
    adapter = find_trained(Path(folder))
    recipe = recipe_of(adapter, trust_remote_code=trust_remote_code)
    base = recipe.base
    if with_adapter and not recipe.adapter.facts.frozen_base:
        base = base.model_copy(update={"model": str(adapter), "init": "pretrained"})
    model = load_base(base, device_named(device), seed=recipe.training.seed)
    trained = Trained(recipe, model.eval(), load_tokenizer(recipe.base))
    if with_adapter and recipe.adapter.facts.frozen_base:
        load_adapter(model, adapter, base=trained.identity, any_base=any_base)
        model.eval()
    return trained


def recipe_of(result: Path, changes: Sequence[str] = (), *, trust_remote_code: bool = False) -> Recipe:
    """Read the recipe beside a trained adapter or model, with `changes` (`section.key=value`), to load a base by it.

    Nothing else reads such a recipe to load by it: the folder may come from a stranger, so its recipe is no consent to
    run the base's own code.

    Raises:
        ModelError: the recipe would run such code, and `trust_remote_code` does not allow it.
    """
    file = result / "recipe.yaml"
    recipe = Recipe.recorded(file, changes)
    if recipe.base.trust_remote_code and not trust_remote_code:
        raise ModelError(
            f"{file}: would run code of {recipe.base.model} (base.trust_remote_code: true), and a recipe that came "
            "with results is no consent. Read that code; if you trust it, add --trust-remote-code, in Python "
            "trust_remote_code=True"
        )
    return recipe


def find_trained(folder: Path) -> Path:
    """The result in a run's folder, or the folder itself if it is one. Raises ModelError if there is none."""
    for place in (folder, folder / "adapter", folder / "model"):
        weights = (place / "adapter_config.json", place / "config.json")
        if (place / "recipe.yaml").is_file() and any(file.is_file() for file in weights):
            return place
    if (folder / "recipe.yaml").is_file():
        raise ModelError(f"{folder}: the run is unfinished; resume with `qlora train ... --resume`")
    raise ModelError(f"{folder}: no trained adapter here. Give a run's folder, or the adapter/ folder in it")


def find_adapter(folder: Path) -> Path:
    """The adapter in a run's folder, or the folder itself if it is one, of ours or PEFT's; else ModelError."""
    for place in (folder, folder / "adapter"):
        if (place / "adapter_config.json").is_file():
            return place
    raise ModelError(f"{folder}: no adapter here. Give a run's folder, or one with an adapter_config.json")


def held_out_loss(trained: Trained) -> tuple[float, int]:
    """Mean loss (nats) per supervised token over the recipe's held-out rows, and how many tokens those are.

    The model gets the layers and the attention of training, so this is the very number that the run printed.
    """
    read_documents_if_apart(trained.model)
    if trained.recipe.adapter.facts.frozen_base:
        use_fused_layers(trained.model.requires_grad_(False))
    dataset = load_dataset(trained.recipe.data, trained.tokenizer, trained.recipe.training.seed)
    batches = held_out_batches(dataset, trained.recipe)
    total, tokens = evaluate(trained.model, batches, objective_of(trained.recipe))
    return total.sum.item() / tokens, tokens
