"""Data pipeline: rows -> conversations -> token ids and labels -> batches, in an order fixed by (seed, epoch)."""

from qlora.data.batches import IGNORE_INDEX, Batch, Batches, Example
from qlora.data.cache import cached_dataset, load_dataset
from qlora.data.dataset import Counts, Dataset, Prompt, held_out_batches, training_batches
from qlora.data.prompt_digests import prompt_digests
from qlora.data.prompts import Prompts, encode_prompt
from qlora.data.remarks import remarks
from qlora.data.sources import on_hub

__all__ = [
    "IGNORE_INDEX",
    "Batch",
    "Batches",
    "Counts",
    "Dataset",
    "Example",
    "Prompt",
    "Prompts",
    "cached_dataset",
    "encode_prompt",
    "held_out_batches",
    "load_dataset",
    "on_hub",
    "prompt_digests",
    "remarks",
    "training_batches",
]
