"""Disk cache of tokenised data sets."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedTokenizerFast

from qlora.data.batches import Example
from qlora.data.dataset import Counts, Dataset, Prompt, make_dataset
from qlora.data.layout import template_of
from qlora.data.sources import identity
from qlora.recipe import Data
from qlora.storage import cache


def load_dataset(section: Data, tokenizer: PreTrainedTokenizerFast, seed: int) -> Dataset:
    """Read, render, tokenise and split the rows of a recipe's `data` section, or load the result from the cache.

    Args:
        section: `recipe.data`.
        tokenizer: a fast tokenizer; it is not changed.
        seed: seed of the split into training and held-out rows.

    Raises:
        DataError: The source cannot be read, no row is usable, a row is bad (with `on_bad_row: error`), or a
            row is too long (with `too_long: error`). The message lists the first ten such rows as
            file:line: reason.

    Examples:
        >>> dataset = load_dataset(recipe.data, load_tokenizer(recipe.base), recipe.training.seed)
        >>> dataset.train[0].input_ids, dataset.counts.supervised
    """
    return cache.cached(
        "data",
        lambda: _key(section, tokenizer, seed),
        make=lambda: make_dataset(section, tokenizer, seed),
        save=_save,
        load=_load,
        size=_bytes,
        about=f"{section.source} as {section.format}, {type(tokenizer).__name__} of {len(tokenizer)} tokens",
    )


def _key(section: Data, tokenizer: PreTrainedTokenizerFast, seed: int) -> str | None:
    """Hash everything that determines the Dataset; None if part of it is unknown, then nothing is cached."""
    sources = [section.source, *([section.held_out] if isinstance(section.held_out, str) else [])]
    contents = [identity(source, section.split) for source in sources]
    if None in contents or not getattr(tokenizer, "is_fast", False):
        return None
    splits = not isinstance(section.held_out, str) and section.held_out > 0
    return cache.digest(
        contents=contents,
        section=section.model_dump(mode="json"),
        template=template_of(section, tokenizer),
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
    """Return the bytes of all token ids and labels; the stored texts are small in comparison."""
    return 2 * sum(row.input_ids.nbytes for row in (*dataset.train, *dataset.held_out))


def _save(dataset: Dataset, folder: Path) -> None:
    tensors = {}
    for name, rows in (("train", dataset.train), ("held_out", dataset.held_out)):
        tensors[f"{name}.input_ids"] = _flat([row.input_ids for row in rows])
        tensors[f"{name}.labels"] = _flat([row.labels for row in rows])
        tensors[f"{name}.lengths"] = _lengths([row.input_ids for row in rows])
    prompts = [np.array(prompt.input_ids, dtype=np.int32) for prompt in dataset.prompts]
    tensors["prompts.input_ids"], tensors["prompts.lengths"] = _flat(prompts), _lengths(prompts)
    save_file(tensors, folder / "tokens.safetensors")
    rest = {
        "train": [row.origin for row in dataset.train],
        "held_out": [row.origin for row in dataset.held_out],
        "prompts": [(prompt.text, prompt.reference, prompt.origin) for prompt in dataset.prompts],
        "counts": asdict(dataset.counts),
        "fingerprint": dataset.fingerprint,
        "pad_id": dataset.pad_id,
        "stop_ids": sorted(dataset.stop_ids),
    }
    (folder / "rest.json").write_text(json.dumps(rest))


def _load(folder: Path) -> Dataset:
    tensors = load_file(folder / "tokens.safetensors")
    rest = json.loads((folder / "rest.json").read_text())
    prompts = _rows(tensors, "prompts", "input_ids")
    return Dataset(
        train=_examples(tensors, "train", rest["train"]),
        held_out=_examples(tensors, "held_out", rest["held_out"]),
        prompts=[Prompt(ids.tolist(), *texts) for ids, texts in zip(prompts, rest["prompts"], strict=True)],
        counts=Counts(**rest["counts"]),
        fingerprint=rest["fingerprint"],
        pad_id=rest["pad_id"],
        stop_ids=frozenset(rest["stop_ids"]),
    )


def _examples(tensors: dict[str, Any], name: str, origins: Sequence[str]) -> list[Example]:
    ids, labels = _rows(tensors, name, "input_ids"), _rows(tensors, name, "labels")
    return [Example(*row) for row in zip(ids, labels, origins, strict=True)]


def _rows(tensors: dict[str, Any], name: str, part: str) -> list[NDArray[np.int32]]:
    """Split a flat array into one view per document."""
    ends = np.cumsum(tensors[f"{name}.lengths"], dtype=np.int64).tolist()
    flat = tensors[f"{name}.{part}"]
    return [flat[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _flat(rows: Sequence[NDArray[np.int32]]) -> NDArray[np.int32]:
    return np.concatenate([np.zeros(0, dtype=np.int32), *rows])


def _lengths(rows: Sequence[NDArray[np.int32]]) -> NDArray[np.int32]:
    return np.array([len(row) for row in rows], dtype=np.int32)
