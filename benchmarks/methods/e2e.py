"""E2E NLG (Novikova et al. 2017, arXiv:1706.09254): restaurant facts (MR, meaning representation) and sentences.

A hash of the MR divides the training set into two halves without a common MR. The base reads the first half as sentence
to MR, and as a list of facts in another notation to sentence (`base.py`). Fine-tuning learns MR to sentence on rows of
the second half. Held-out loss comes from the development set, and answers are scored against all references of the
official test set.
"""

import csv
import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FILES = {"train": "trainset.csv", "dev": "devset.csv", "test": "testset_w_refs.csv"}
FACT = re.compile(r"([A-Za-z ]+)\[([^\]]*)\](?:, )?")
NAMES = {
    "eatType": "kind",
    "priceRange": "price",
    "customer rating": "rating",
    "familyFriendly": "children welcome",
}
"""names of facts in lists, which differ from those in MRs"""
SHUFFLE = 2021  # fixed: every cell is judged on the same held-out rows and the same test MRs


@dataclass(frozen=True)
class Pair:
    """Facts of a restaurant and one sentence about it."""

    mr: str
    ref: str


@dataclass(frozen=True)
class E2E:
    """The parts of the data set that the experiments use."""

    base: list[Pair]
    """first half of the training set, by MR"""
    tune: list[Pair]
    """second half of the training set"""
    dev: list[Pair]
    test: dict[str, list[str]]
    """all references of each MR"""

    @classmethod
    def read(cls, folder: Path) -> "E2E":
        """Read the three files. Raises SystemExit with the missing file if one is missing."""
        train, dev, test = (pairs(folder / name) for name in FILES.values())
        references: dict[str, list[str]] = {}
        for pair in test:
            references.setdefault(pair.mr, []).append(pair.ref)
        return cls(
            [pair for pair in train if in_base_half(pair.mr)],
            [pair for pair in train if not in_base_half(pair.mr)],
            dev,
            references,
        )

    def training_rows(self, seed: int, count: int) -> list[dict[str, str]]:
        """Return `count` random rows of the second half; the same seed gives the same rows in the same order."""
        return [as_row(pair) for pair in random.Random(seed).sample(self.tune, min(count, len(self.tune)))]

    def held_out_rows(self, count: int) -> list[dict[str, str]]:
        """Return `count` rows of the development set, the same for every cell."""
        return [as_row(pair) for pair in random.Random(SHUFFLE).sample(self.dev, min(count, len(self.dev)))]

    def test_sample(self, count: int) -> dict[str, list[str]]:
        """Return `count` MRs of the test set with all their references, the same for every cell."""
        chosen = random.Random(SHUFFLE).sample(sorted(self.test), min(count, len(self.test)))
        return {mr: self.test[mr] for mr in chosen}


def pairs(file: Path) -> list[Pair]:
    """Read one file of the data set, with runs of white space in a sentence made single spaces."""
    if not file.is_file():
        raise SystemExit(
            f"{file}: missing. --data needs the folder of the E2E NLG data with {', '.join(FILES.values())} "
            "(github.com/tuetschek/e2e-dataset)"
        )
    with file.open(encoding="utf-8", newline="") as rows:
        return [Pair(row["mr"].strip(), " ".join(row["ref"].split())) for row in csv.DictReader(rows)]


def in_base_half(mr: str) -> bool:
    """Return True if rows with this MR belong to the base's half."""
    return hashlib.sha256(mr.encode()).digest()[0] % 2 == 0


def as_row(pair: Pair) -> dict[str, str]:
    """Return the row that fine-tuning learns: MR to sentence."""
    return {"prompt": pair.mr, "completion": pair.ref}


def base_rows(pairs: Sequence[Pair]) -> list[dict[str, str]]:
    """Return the rows that the base reads, two for each pair: sentence to MR, and a list of facts to sentence."""
    draws = random.Random(SHUFFLE)
    rows = []
    for pair in pairs:
        rows.append({"prompt": pair.ref, "completion": pair.mr})
        rows.append({"prompt": as_list(pair.mr, draws), "completion": pair.ref})
    return rows


def as_list(mr: str, draws: random.Random) -> str:
    """Return the facts of an MR in a random order and another notation, as in `food: Italian; name: Zizzi`."""
    facts = [(NAMES.get(key, key), value) for key, value in FACT.findall(mr)]
    draws.shuffle(facts)
    return "; ".join(f"{key}: {value}" for key, value in facts)
