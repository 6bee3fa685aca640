"""Disk cache of tokenised data sets."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from qlora.data.dataset import Counts, Dataset, Prompt, make_dataset
from qlora.data.examples import TOKEN_BYTES, Examples
from qlora.data.layout import template_of
from qlora.data.mixture import Share
from qlora.data.sources import identity
from qlora.errors import DataError
from qlora.formats import Row
from qlora.recipe import Data
from qlora.runtime.progress import Progress
from qlora.storage import cache


def load_dataset(
    section: Data,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    *,
    rows: Iterable[Row] | None = None,
    progress: Progress | None = None,
) -> Dataset:
    """Read, render, tokenise and split the rows of a recipe's `data` section, or load the result from the cache.

    Args:
        section: `recipe.data`.
        tokenizer: a fast tokenizer; it is not changed.
        seed: seed of the split into training and held-out rows.
        rows: rows in memory, as dictionaries; they replace those of `data.source`, which is then only their name.
            They are not cached.
        progress: called with a line of text as the work proceeds.

    Raises:
        DataError: The source cannot be read, no row is usable, a row is bad (with `on_bad_row: error`), or a
            row is too long (with `too_long: error`). The message lists the first ten such rows as
            file:line: reason.
        SaveError: The disk has no room for the tokens.

    Examples:
        >>> dataset = load_dataset(recipe.data, load_tokenizer(recipe.base), recipe.training.seed)
        >>> dataset.train[0].input_ids, dataset.counts.supervised
    """
    given = None if rows is None else list(rows)
    if given is not None and section.sources:
        raise DataError("data.sources: rows from memory replace one data.source; leave data.sources out")
    if given is not None and not given:
        raise DataError("rows: the list is empty. Give at least one row, or leave it out to read data.source")
    return cache.cached(
        "data",
        lambda: None if given is not None else _key(section, tokenizer, seed),
        make=lambda: make_dataset(section, tokenizer, seed, given, progress),
        save=_save,
        load=_load,
        size=_bytes,
        about=f"{section.names} as {section.parts[0].format}, {type(tokenizer).__name__} of {len(tokenizer)} tokens",
    )


def cached_dataset(section: Data, tokenizer: PreTrainedTokenizerFast, seed: int) -> Dataset | None:
    """Return what `load_dataset` returns if it is in the cache; None if the rows would have to be read again."""
    return cache.found("data", lambda: _key(section, tokenizer, seed), _load)


def _key(section: Data, tokenizer: PreTrainedTokenizerFast, seed: int) -> str | None:
    """Hash everything that determines the Dataset; None if part of it is unknown, then nothing is cached."""
    parts = [*section.parts, *([section.evaluation] if section.evaluation else [])]
    contents = [identity(part.source_name, part.split) for part in parts]
    if None in contents or not getattr(tokenizer, "is_fast", False):
        return None
    splits = not isinstance(section.held_out, str) and section.held_out > 0
    return cache.digest(
        contents=contents,
        section=section.model_dump(mode="json"),
        templates=[template_of(part, tokenizer) for part in parts],
        seed=seed if splits else None,
        tokenizer=type(tokenizer).__name__,
        vocabulary=hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        chat_template=tokenizer.chat_template,
        special_tokens={name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        code_version=cache.code_version(
            "formats", "data", libraries=("tokenizers", "transformers", "jinja2")
        ),
    )


def _bytes(dataset: Dataset) -> int:
    """Return the bytes of all tokens; the stored texts are small in comparison."""
    return TOKEN_BYTES * int(dataset.train.lengths.sum() + dataset.held_out.lengths.sum())


def _save(dataset: Dataset, folder: Path) -> None:
    dataset.train.save(folder, "train")
    dataset.held_out.save(folder, "held_out")
    rest = {
        "train": list(dataset.train.origins),
        "held_out": list(dataset.held_out.origins),
        "prompts": dataset.prompts,
        "counts": asdict(dataset.counts),
        "fingerprint": dataset.fingerprint,
        "pad_id": dataset.pad_id,
        "stop_ids": sorted(dataset.stop_ids),
        "lengths": list(dataset.lengths.items()),
        "left_out": dataset.left_out,
        "mixture": [asdict(share) for share in dataset.mixture],
        "shared_system": dataset.shared_system,
    }
    (folder / "rest.json").write_text(json.dumps(rest))


def _load(folder: Path) -> Dataset:
    rest = json.loads((folder / "rest.json").read_text())
    return Dataset(
        train=Examples.load(folder, "train", rest["train"]),
        held_out=Examples.load(folder, "held_out", rest["held_out"]),
        prompts=[Prompt(*prompt) for prompt in rest["prompts"]],
        counts=Counts(**rest["counts"]),
        fingerprint=rest["fingerprint"],
        pad_id=rest["pad_id"],
        stop_ids=frozenset(rest["stop_ids"]),
        lengths=dict(rest["lengths"]),
        left_out=rest["left_out"],
        mixture=tuple(Share(**share) for share in rest["mixture"]),
        shared_system=rest["shared_system"],
    )
