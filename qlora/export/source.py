"""Model to export: base and adapter of a run, a fully trained model, or a folder with a whole model.

Its tensors are read, merged and passed on one at a time, so a model can be larger than the memory.
"""

import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast as Tokenizer

from qlora.data import Prompts
from qlora.data.prompt_files import TEMPLATE_FILE, closing_token, shared_system, write_prompt_files
from qlora.errors import ModelError, UsageError, listed
from qlora.export.families import Settings
from qlora.export.gguf_tensors import own_name
from qlora.export.gguf_tokenizer import SPACE, Vocabulary
from qlora.inference.load import find_trained, recipe_of
from qlora.merging.write import MergeSource, Onto
from qlora.model.load import load_architecture, load_config, load_tokenizer
from qlora.model.tokens import tokenizer_of
from qlora.recipe import Base, Recipe
from qlora.storage.safetensors_files import FLOATS, ShardReader, find_checkpoint


@dataclass(frozen=True)
class ModelSource:
    """A model, its tokenizer and its chat template."""

    name: str
    config: Any
    """transformers' configuration"""
    base: Base
    tokenizer: Tokenizer
    prompts: Prompts | None
    """prompts of the training rows; None for a folder without a recipe"""
    merge: MergeSource | None
    """base and adapter; None for a whole model"""
    onto: Onto
    """the weights that the adapter is added to"""
    system: str | None = None
    """system message that all training rows share"""
    note: str | None = None

    @cached_property
    def settings(self) -> Settings:
        """The model's settings in a GGUF file. Raises ModelError if llama.cpp would ignore one."""
        return Settings.of(self.config)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor of the text model, by its own name, in the order of the files.

        Raises:
            ModelError: the files have other tensors than the model, or packed ones.
        """
        model: Any = load_architecture(self.base)
        named = ((own_name(key), tensor) for key, tensor in model.state_dict().items())
        expected = {name: tuple(tensor.shape) for name, tensor in named if name is not None}
        if self.config.get_text_config().tie_word_embeddings:
            expected.pop("lm_head.weight", None)
        names = [name for key in self._keys if (name := own_name(key)) in expected]
        if missing := sorted(expected.keys() - set(names)):
            raise ModelError(f"{self._reader.folder}: the files lack {listed(missing)}. Restore them")
        if self.merge is not None and (tokens := self.merge.vocabulary) is not None:
            for name in {"embed_tokens.weight", "lm_head.weight"} & expected.keys():
                expected[name] = (tokens, *expected[name][1:])
        return {name: expected[name] for name in names}

    @property
    def rows(self) -> int:
        """Rows of the embedding."""
        return self.shapes["embed_tokens.weight"][0]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of `shapes`, in the same order, on the CPU."""
        if self.merge is None:
            pairs = ((key, self._reader[key]) for key in self._keys if own_name(key) in self.shapes)
        else:
            pairs = (pair for tensors in self.merge.tensors(self.onto) for pair in tensors.items())
        for key, tensor in pairs:
            name = own_name(key)
            if name in self.shapes:
                yield name, tensor.detach().cpu()

    @cached_property
    def closing(self) -> str | None:
        """The token that ends an answer; None for the tokenizer's eos."""
        return None if self.prompts is None else closing_token(self.prompts)

    @cached_property
    def template(self) -> str | None:
        """Chat template of the training rows, as jinja source; None if there is none."""
        if self.prompts is None:
            return self.tokenizer.get_chat_template() if self.tokenizer.chat_template else None
        with tempfile.TemporaryDirectory() as folder:
            self.tokenizer.save_pretrained(folder)
            write_prompt_files(Path(folder), self.prompts)
            file = Path(folder) / TEMPLATE_FILE
            return file.read_text(encoding="utf-8") if file.is_file() else None

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The tokenizer as llama.cpp reads it. Raises ModelError if it has no such tokenizer."""
        found = Vocabulary.of(self.tokenizer, self.rows, self.closing)
        if self.prompts is not None:
            # a server adds bos itself, so the file says whether the training rows began with it
            begins = self.prompts.encode("a")[:1] == [found.ids.get("bos")]
            found = replace(found, adds_bos=begins)
            if others := sorted(self.prompts.stop_ids - {found.ids["eos"]}):
                found = replace(found, ids={**found.ids, "eot": others[0]})
            if found.space == "first" and not self._begins_with_space:
                found = replace(found, space="never")
        return found

    @property
    def notes(self) -> tuple[str, ...]:
        """Differences from transformers that the user should know."""
        own = [self.note] if self.note else []
        if self.vocabulary.space == "first" and re.search(rf".({self._control}).", self._prompt, re.DOTALL):
            own.append(
                "llama.cpp reads a space before the text after each control token within a prompt; the training rows "
                "had none there"
            )
        return (*self.settings.notes, *own)

    @cached_property
    def _prompt(self) -> str:
        """A prompt as text, with its control tokens."""
        if self.template is None:
            return "a"
        messages = [{"role": "user", "content": "a"}]
        settings: Any = {"chat_template": self.template, "tokenize": False, "add_generation_prompt": True}
        return str(self.tokenizer.apply_chat_template(messages, **settings))

    @cached_property
    def _control(self) -> str:
        """A regular expression for the control tokens."""
        tokens = {str(token) for token in self.tokenizer.added_tokens_decoder.values()}
        return "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)"

    @property
    def _begins_with_space(self) -> bool:
        """True if training put a space (▁) before the first text of a prompt, after bos and control tokens.

        llama.cpp puts it before the text after every control token, or before none.
        """
        assert self.prompts is not None
        control = self.tokenizer.added_tokens_decoder
        ids = [number for number in self.prompts.encode("a") if number not in control]
        read = "".join(self.tokenizer.convert_ids_to_tokens(ids))
        text = re.sub(rf"^({self._control})+", "", self._prompt)
        return len(read) - len(read.lstrip(SPACE)) > len(text) - len(text.lstrip(" "))

    @property
    def _keys(self) -> list[str]:
        return self.merge.keys if self.merge else list(self._reader)

    @cached_property
    def _reader(self) -> ShardReader:
        if self.merge is not None:
            return self.merge.reader
        reader = ShardReader(find_checkpoint(self.base.model, self.base.revision))
        if packed := [name for name, stored in reader.stored.items() if stored.dtype not in FLOATS]:
            raise ModelError(
                f"{reader.folder}: {listed(packed)} are quantized, and an export starts from 16 bits. Write the model "
                "with `qlora merge RUN --to DIR`, or export the run itself"
            )
        return reader


def model_source(
    path: str | Path,
    *,
    onto: str | None = None,
    device: torch.device | str = "cpu",
    any_base: bool = False,
    trust_remote_code: bool = False,
) -> ModelSource:
    """Find the model to export.

    Args:
        path: folder of a run, of an adapter, or of a whole model (merged, or a base: also its name).
        onto: the weights that the adapter is added to, original or dequantized; None: those it was trained with.
        device: device that merges the tensors.
        any_base: export even if the recipe's base is not the one from training.
        trust_remote_code: allow the base to run its own code, if the recipe stored with the adapter asks for it.

    Raises:
        ModelError: there is no such model, or its base has changed.
        UsageError: the base does not have the weights that `onto` asks for.
    """
    path = Path(path)
    if ((path / "config.json").is_file() and not (path / "recipe.yaml").is_file()) or not path.is_dir():
        return _whole_model(path)
    folder = find_trained(path)
    recipe = recipe_of(folder, trust_remote_code=trust_remote_code)
    run = folder.parent if folder.name in ("adapter", "model") else folder
    tokenizer = tokenizer_of(recipe)
    system = shared_system(folder)
    prompts = Prompts(recipe.data, tokenizer, system)
    if not recipe.adapter.facts.frozen_base:
        base = recipe.base.model_copy(update={"model": str(folder), "init": "pretrained", "revision": None})
        _refuse_choice(onto, "all weights were trained, so there is nothing to merge")
        config = load_config(base)
        return ModelSource(run.name, config, base, tokenizer, prompts, None, "original", system)
    if recipe.base.init != "pretrained":
        raise ModelError(
            f"{folder}: its base was made from a seed (base.init={recipe.base.init}), so it has no files to merge onto"
        )
    merge = MergeSource(recipe.base, folder, device, any_base=any_base)
    chosen = _choice(recipe, merge, onto)
    return ModelSource(
        run.resolve().name, load_config(recipe.base), recipe.base, tokenizer, prompts, merge, chosen, system
    )


def _whole_model(path: Path) -> ModelSource:
    find_checkpoint(path)  # says that there is none before the words of a recipe do
    base = Base(model=str(path), quantization="none")
    config = load_config(base)
    system = shared_system(path) if path.is_dir() else None
    return ModelSource(path.name, config, base, load_tokenizer(base), None, None, "original", system)


def _refuse_choice(onto: str | None, why: str) -> None:
    if onto is not None:
        raise UsageError(f"--onto {onto}: {why}; leave it out")


def _choice(recipe: Recipe, merge: MergeSource, onto: str | None) -> Onto:
    """Return the weights to add the adapter to: those that it was trained with, unless the user chose."""
    choices = [one for one in merge.choices if one != "nf4"]
    trained_with: Onto = "dequantized" if "dequantized" in choices else "original"
    if onto is None:
        return trained_with
    if onto not in choices:
        raise UsageError(
            f"--onto {onto}: {recipe.base.model} does not have these weights, it has {' and '.join(choices)}"
        )
    return onto
