"""Tokens that every contender trains on: a list of steps, each a list of documents.

All contenders take the same optimizer steps over the same documents. Each contender chooses how to arrange a step's
documents in tensors (padded or packed, in how many micro-batches), and this choice is part of the measurement. The last
step repeats the documents of the first, so that the loss before and after training can be compared.

The first label of a document is always -100: no token predicts it, and libraries differ in whether they count it.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

IGNORE_INDEX = -100


class Document(NamedTuple):
    """One sequence: `input_ids` [T] and the aligned `labels` [T], int64."""

    input_ids: Tensor
    labels: Tensor


class Workload(NamedTuple):
    """Documents of all steps of one comparison."""

    steps: list[list[Document]]

    def tokens(self) -> list[int]:
        """Return the number of tokens of each step, without padding."""
        return [sum(len(document.input_ids) for document in step) for step in self.steps]

    def supervised(self) -> list[int]:
        """Return the number of tokens with a label in each step."""
        return [sum(int((d.labels != IGNORE_INDEX).sum()) for d in step) for step in self.steps]

    def lengths(self) -> list[list[int]]:
        """Return the number of tokens of each document in each step."""
        return [[len(document.input_ids) for document in step] for step in self.steps]

    def save(self, path: Path) -> None:
        """Write the workload to a safetensors file."""
        documents = [document for step in self.steps for document in step]
        lengths = [len(document.input_ids) for document in documents]
        tensors = {
            "input_ids": torch.cat([document.input_ids for document in documents]),
            "labels": torch.cat([document.labels for document in documents]),
            "lengths": torch.tensor(lengths),
            "documents": torch.tensor([len(step) for step in self.steps]),
        }
        save_file(tensors, path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a workload that `save` wrote."""
        tensors = load_file(path)
        lengths = tensors["lengths"].tolist()
        pairs = zip(tensors["input_ids"].split(lengths), tensors["labels"].split(lengths), strict=True)
        documents = iter([Document(ids.clone(), labels.clone()) for ids, labels in pairs])
        return cls([[next(documents) for _ in range(count)] for count in tensors["documents"].tolist()])


def dense(steps: int, sequences: int, length: int, vocabulary: int, seed: int) -> Workload:
    """Draw uniformly random tokens, all supervised: `sequences` rows of `length` tokens per step."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (steps - 1, sequences, length), generator=generator)
    return _closed([[_document(row, prompt=1) for row in step] for step in ids])


def question_answer(
    rows: Path,
    tokenizer: Path,
    *,
    steps: int,
    documents: int,
    micro_batch: int,
    max_length: int,
    vocabulary: int,
    seed: int,
) -> Workload:
    """Read questions and answers from a JSON Lines file; only answers are supervised.

    The rows are put into groups of `micro_batch` rows of almost the same length, as with transformers'
    `group_by_length`. A step consists of random groups. This way neither padding nor packing has a disadvantage. Token
    ids are taken modulo `vocabulary`: the base is random, so only the lengths matter.

    Args:
        rows: File with the fields `question` and `answer`.
        tokenizer: Folder of the tokenizer.
        steps: Number of steps; the last repeats the first.
        documents: Rows per step.
        micro_batch: Rows per group.
        max_length: Documents are cut after this number of tokens. Rows with a longer question are left out.
        vocabulary: Size of the base's vocabulary.
        seed: Seed for the order of the groups.

    Raises:
        SystemExit: The file has too few rows.
    """
    from transformers import AutoTokenizer

    encode = AutoTokenizer.from_pretrained(tokenizer)
    end = [0 if encode.eos_token_id is None else encode.eos_token_id]
    needed = (steps - 1) * documents
    usable: list[Document] = []
    with rows.open() as lines:
        for line in lines:
            row = json.loads(line)
            prompt = encode(row["question"] + "\n", add_special_tokens=False)["input_ids"]
            answer = encode(row["answer"], add_special_tokens=False)["input_ids"]
            if len(prompt) < max_length:
                ids = torch.tensor([*prompt, *answer, *end][:max_length]) % vocabulary
                usable.append(_document(ids, prompt=len(prompt)))
            if len(usable) == needed:
                return _closed(_grouped(usable, documents, micro_batch, seed))
    raise SystemExit(
        f"{rows}: {len(usable)} usable rows, but {needed} are needed; use fewer steps or documents"
    )


def micro_batches(documents: Sequence[Document], size: int) -> Iterator[list[Document]]:
    """Yield a step's documents in micro-batches of `size` with similar lengths, the longest first."""
    ordered = sorted(documents, key=lambda document: -len(document.input_ids))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def padded(documents: Sequence[Document], pad_id: int = 0) -> dict[str, Tensor]:
    """Return `input_ids`, `labels` and `attention_mask` [B, T], padded on the right to the longest document."""
    width = max(len(document.input_ids) for document in documents)
    ids = torch.full((len(documents), width), pad_id)
    labels = torch.full((len(documents), width), IGNORE_INDEX)
    mask = torch.zeros((len(documents), width), dtype=torch.int64)
    for row, document in enumerate(documents):
        length = len(document.input_ids)
        ids[row, :length], labels[row, :length], mask[row, :length] = document.input_ids, document.labels, 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def _grouped(usable: list[Document], documents: int, micro_batch: int, seed: int) -> list[list[Document]]:
    """Form steps of `documents` documents from groups of similar length."""
    groups = list(micro_batches(usable, micro_batch))
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [document for index in order for document in groups[index]]
    return [shuffled[start : start + documents] for start in range(0, len(shuffled), documents)]


def _document(ids: Tensor, prompt: int) -> Document:
    labels = ids.clone()
    labels[: max(1, prompt)] = IGNORE_INDEX
    return Document(ids, labels)


def _closed(steps: list[list[Document]]) -> Workload:
    return Workload([*steps, steps[0]])
