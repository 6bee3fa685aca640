"""The loss of a fine-tuned model on rows of another source than its recipe's."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from qlora.data import Dataset, cached_dataset, load_dataset
from qlora.data.sources import UnreadSource
from qlora.errors import DataError
from qlora.inference.load import Trained
from qlora.recipe import Data, Recipe
from qlora.recipe.rules import flatten, keys_without_effect
from qlora.storage import manifest
from qlora.storage.manifest import MANIFEST


@dataclass(frozen=True)
class OtherRows:
    """All usable rows of a source, as tokens of a model."""

    section: Data
    """the recipe's `data`, with the source and its format in place of its own"""
    dataset: Dataset
    """the rows; all of them are held out"""
    seen: int | None
    """number of rows with exactly the tokens of a training row; None if the training rows are not in the cache"""

    def about(self) -> dict[str, Any]:
        """Return plain values: the source, its rows that were evaluated, and the counts of the others."""
        counts = self.dataset.counts
        left_out = {
            name: getattr(counts, name) for name in ("bad", "dropped", "unsupervised", "marked", "truncated")
        }
        return {
            "source": self.section.source_name,
            "format": self.section.format,
            "rows": len(self.dataset.held_out),
            "rows_read": counts.read,
            "rows_left_out": {name: count for name, count in left_out.items() if count},
            "rows_seen_in_training": self.seen,
        }


def section_for(section: Data, source: str, changes: Mapping[str, Any]) -> Data:
    """Return a recipe's `data` section for another source, whose rows are all read.

    Args:
        section: the section of the recipe; of several sources the first one counts.
        source: any source that a recipe accepts.
        changes: keys of the section to change. Another `format` takes back `columns` and what it cannot have.

    Raises:
        RecipeError: a change is wrong.
    """
    settings = {
        **section.parts[0].model_dump(),
        "sources": [],
        "source": source,
        "held_out": 0,
        "limit": None,
    }
    if "format" in changes:  # the columns of the recipe are fields of another format
        settings["columns"] = {}
    settings |= changes
    defaults = Data().model_dump()
    given = {key: value for key, value in settings.items() if key in changes or value != defaults[key]}
    for key in keys_without_effect(flatten({"data": settings})):
        name = key.removeprefix("data.")
        if name not in changes:
            given.pop(name, None)
    whole = {"base": {"model": "bundled/base"}, "data": {**given, "source": source, "held_out": 0}}
    return Recipe.from_dict(whole, "--data").data


def read_other_rows(trained: Trained, source: str, changes: Mapping[str, Any] | None = None) -> OtherRows:
    """Read all rows of a source for a model; arguments as in `section_for`.

    Raises:
        RecipeError: a change is wrong.
        DataError: the source cannot be read, or a row is bad.
    """
    section = section_for(trained.recipe.data, source, changes or {})
    try:
        dataset = load_dataset(section, trained.tokenizer, trained.recipe.training.seed)
    except UnreadSource as error:
        raise DataError(f"--data: {error.reason}") from error
    return OtherRows(section, replace(dataset, held_out=dataset.train), _seen(trained, dataset))


def _seen(trained: Trained, dataset: Dataset) -> int | None:
    """Count the rows that the model was trained on, if its training rows are in the cache and have not changed."""
    if not (trained.folder / MANIFEST).is_file():
        return None
    recipe = trained.recipe
    training = cached_dataset(recipe.data, trained.tokenizer, recipe.training.seed)
    if training is None or manifest.read(trained.folder).get("data") != training.fingerprint:
        return None
    return dataset.train.among(training.train.digests)
