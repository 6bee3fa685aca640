"""A base with several adapters to choose from by name: those of a run or adapter, and others of the same base."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from qlora.adapter.config import CONFIG_FILE, read_fields
from qlora.adapter.identity import BaseIdentity
from qlora.adapter.start import find_adapter
from qlora.adapter.switch import Adapters
from qlora.adapter.trained_parts import TOKENS
from qlora.errors import ModelError, UsageError
from qlora.inference.load import Trained, find_trained, load_trained, recipe_of

BASE = "base"
"""name of the model without an adapter"""


class NamedAdapters(NamedTuple):
    """A base in memory, its adapters by name, and their folders."""

    trained: Trained
    """model, tokenizer and recipe of the first folder"""
    adapters: Adapters
    folders: dict[str, Path]
    """folder of each adapter, in loading order; empty if all weights were trained"""


def open_adapters(
    folder: str,
    others: Mapping[str, str],
    *,
    device: str = "auto",
    any_base: bool = False,
    trust_remote_code: bool = False,
) -> NamedAdapters:
    """Load the model of a run or adapter, and other adapters. The first one is active, under the name of its recipe.

    Args:
        folder: folder of a run or of an adapter.
        others: folders of other adapters of the same base, by name.
        device: auto, cpu, cuda or cuda:N.
        any_base: accept adapters that were trained on another base. For the run's own adapter this also covers its
            tokenizer and template.
        trust_remote_code: see `load_trained`.

    Raises:
        ModelError: an adapter is missing, does not fit, was trained on another base, or trained tokens that the
            tokenizer of the first lacks; or as `load_trained`.
        UsageError: a name is taken.
    """
    recipe = recipe_of(find_trained(Path(folder)), trust_remote_code=trust_remote_code)
    own = {recipe.name: folder} if recipe.adapter.facts.frozen_base else {}
    if not own and others:
        raise ModelError(
            f"{folder}: all weights were trained, so adapters of its base do not fit it. Leave --adapter out"
        )
    if BASE in others or own.keys() & others.keys():
        raise UsageError(f"--adapter: the names {BASE!r} and {recipe.name!r} are taken; choose another name")
    folders = {name: find_adapter(Path(path)) for name, path in {**own, **others}.items()}
    trained = load_trained(
        folder, device=device, with_adapter=not own, prepared=True, trust_remote_code=trust_remote_code
    )
    adapters = Adapters(trained.model)
    for name, path in folders.items():
        # The others answer with the tokenizer of the first, so only their base is compared
        identity = trained.identity if name in own else None
        if identity is None and not any_base:
            _check_tokens(path, trained)
        adapters.load(name, path, base=identity, any_base=any_base)
    if own:
        adapters.activate(recipe.name)
    return NamedAdapters(trained, adapters, folders)


def _check_tokens(folder: Path, trained: Trained) -> None:
    """Raise ModelError if the adapter in `folder` trained tokens of another tokenizer than that of `trained`."""
    recorded = BaseIdentity.read(folder)
    if recorded is None or recorded.tokenizer in (None, trained.identity.tokenizer):
        return
    if read_fields(folder / CONFIG_FILE).get(TOKENS):
        raise ModelError(
            f"--adapter: {folder} has rows of tokens that were trained with another tokenizer than the one of "
            f"{trained.folder}, so their ids mean other tokens here. Use it on its own, as the first folder; or "
            "accept that with --any-base"
        )
