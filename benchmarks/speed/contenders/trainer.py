"""PEFT contender in transformers' Trainer.

The model of `peft_tuned` (compute dtype throughout, no autocast, no attention mask), fused AdamW, documents of similar
length in a micro-batch. The flags `liger` and `compile` add Liger's kernels and torch.compile.
"""

import tempfile
from typing import Any

from transformers import Trainer, TrainingArguments

from benchmarks.speed.contenders.peft_loop import adapted, adapter, inputs_of, load
from benchmarks.speed.contenders.trainer_steps import (
    StepClock,
    arguments,
    counting,
    dtype_of,
    flags_of,
    in_order,
    rows,
)
from benchmarks.speed.job import Answer, Job
from benchmarks.speed.meter import Meter, contend
from benchmarks.speed.workload import Document, Workload


def train(job: Job, meter: Meter) -> Answer:
    """Load the model, train every step and return the measurements."""
    steps = Workload.load(job.workload)
    with tempfile.TemporaryDirectory() as folder:
        used = arguments(job, steps, folder) | {"use_liger_kernel": "liger" in job.flags}
        trainer = Trainer(
            model=adapted(load(job), job, dtype_of(job)),
            args=TrainingArguments(remove_unused_columns=False, **used),
            train_dataset=rows(in_order(steps, job.micro_batch)),
            data_collator=counting(collate, meter),
            callbacks=[StepClock(meter)],
        )
        meter.loaded()
        trainer.train()
    return meter.answer(adapter(trainer.model), flags_of(used) | {"autocast": "off"})


def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a padded micro-batch."""
    return inputs_of([Document(**example) for example in examples], mask=False)


if __name__ == "__main__":
    contend(train)
