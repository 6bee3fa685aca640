"""Unsloth as a contender, on CUDA if it is installed: its patched model in transformers' Trainer.

The flags `ckpt offload` select its default checkpointing ("unsloth", which keeps activations in host memory), `ckpt`
the usual one. Without a flag activations are kept. This file has not run yet: it was written without a GPU.
"""

import os
import tempfile

os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")

try:
    from unsloth import FastLanguageModel  # must come before transformers, which it patches
except ImportError as error:
    FastLanguageModel, WHY = None, str(error)

from transformers import Trainer, TrainingArguments

from benchmarks.speed.contenders.peft_loop import adapter, start_from
from benchmarks.speed.contenders.trainer import collate
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
from benchmarks.speed.workload import Workload


def train(job: Job, meter: Meter) -> Answer:
    """Load the model, train every step and return the measurements."""
    if FastLanguageModel is None:
        raise ModuleNotFoundError(f"not installed: unsloth ({WHY})")
    checkpointing = "unsloth" if "offload" in job.flags else "ckpt" in job.flags
    steps = Workload.load(job.workload)
    model, _ = FastLanguageModel.from_pretrained(
        job.base, max_seq_length=job.max_length, dtype=dtype_of(job), load_in_4bit=True
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=job.rank,
        lora_alpha=job.alpha,
        lora_dropout=0.0,
        bias="none",
        use_gradient_checkpointing=checkpointing,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    )
    start_from(model, job)
    with tempfile.TemporaryDirectory() as folder:
        used = arguments(job, steps, folder) | {
            "gradient_checkpointing": bool(checkpointing),
            "bf16": job.dtype == "bfloat16",
        }
        trainer = Trainer(
            model=model,
            args=TrainingArguments(remove_unused_columns=False, **used),
            train_dataset=rows(in_order(steps, job.micro_batch)),
            data_collator=counting(collate, meter),
            callbacks=[StepClock(meter)],
        )
        meter.loaded()
        trainer.train()
    return meter.answer(adapter(model), flags_of(used) | {"use_gradient_checkpointing": str(checkpointing)})


if __name__ == "__main__":
    contend(train)
