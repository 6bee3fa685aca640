"""TRL's SFTTrainer as a contender, on the same tokens, with its own collator, loss and packing.

The flag `packing` packs a step's documents with TRL's best-fit `pack_dataset`, one row per micro-batch (padding-free).
TRL holds A and B of a quantized base in bfloat16. If the products are float32, A and B are converted to float32,
because such a machine emulates bfloat16 products, which would slow TRL down.
"""

import tempfile
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer, pack_dataset

from benchmarks.speed.contenders.peft_loop import adapter, load, lora_config, start_from
from benchmarks.speed.contenders.trainer_steps import (
    StepClock,
    arguments,
    counting,
    dtype_of,
    flags_of,
    in_order,
)
from benchmarks.speed.job import Answer, Job
from benchmarks.speed.meter import Meter, contend
from benchmarks.speed.workload import Document, Workload
from qlora import bundled


def train(job: Job, meter: Meter) -> Answer:
    """Load the model, train every step and return the measurements."""
    steps = Workload.load(job.workload)
    with tempfile.TemporaryDirectory() as folder:
        used = arguments(job, steps, folder) | {
            "bf16": job.dtype == "bfloat16",
            "use_liger_kernel": "liger" in job.flags,
            "max_length": None,
        }
        if "selective" in job.flags:
            used["gradient_checkpointing_kwargs"] = {"selective": True}
        if "packing" in job.flags:
            packed = [pack(step, job.max_length) for step in steps.steps]
            count = max(map(len, packed))
            data = Dataset.from_list([row for rows in packed for row in spread(rows, count)])
            used |= {
                "padding_free": True,
                "per_device_train_batch_size": 1,
                "gradient_accumulation_steps": count,
            }
        else:
            data = Dataset.from_list([as_row(d) for d in in_order(steps, job.micro_batch)])
        trainer = SFTTrainer(
            model=load(job),
            args=SFTConfig(dataset_kwargs={"skip_prepare_dataset": True}, **used),
            train_dataset=data,
            processing_class=AutoTokenizer.from_pretrained(bundled.path("bundled/base")),
            peft_config=lora_config(job),
            callbacks=[StepClock(meter)],
        )
        start_from(trainer.model, job, dtype_of(job))
        trainer.data_collator = counting(trainer.data_collator, meter)
        meter.loaded()
        trainer.train()
    return meter.answer(adapter(trainer.model), flags_of(used) | {"lora_dtype": job.dtype})


def as_row(document: Document) -> dict[str, list[int]]:
    """Convert a document to a tokenized row for SFTTrainer."""
    return {"input_ids": document.input_ids.tolist(), "labels": document.labels.tolist()}


def pack(documents: list[Document], max_length: int) -> list[dict[str, Any]]:
    """Pack a step's documents into rows of at most `max_length` tokens."""
    data = Dataset.from_list([as_row(document) for document in documents])
    return pack_dataset(data, max_length, "bfd").to_list()


def spread(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Divide packed rows until there are `count`, because Trainer needs the same number of micro-batches in every step.

    The last document of a row with several becomes a row. Rows are not padded, so no token is added.
    """
    rows = [dict(row) for row in rows]
    while len(rows) < count:
        row = max(rows, key=lambda row: len(row["seq_lengths"]))
        *before, last = row["seq_lengths"]
        rows.append(
            {"input_ids": row["input_ids"][-last:], "labels": row["labels"][-last:], "seq_lengths": [last]}
        )
        row["input_ids"], row["labels"] = row["input_ids"][:-last], row["labels"][:-last]
        row["seq_lengths"] = before
    return rows


if __name__ == "__main__":
    contend(train)
