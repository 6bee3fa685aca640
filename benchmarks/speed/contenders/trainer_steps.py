"""Shared by the contenders that use transformers' Trainer: clock, data order, arguments."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from benchmarks.speed.job import Job
from benchmarks.speed.meter import Meter
from benchmarks.speed.workload import Document, Workload, micro_batches


class StepClock(TrainerCallback):
    """Callback that reports each step to the meter when its loss and gradient norm are logged."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock of the first step."""
        self.meter.begin()

    def on_log(self, *args: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Record a step; the last log of a run is a summary without one."""
        if logs is not None and "loss" in logs:
            self.meter.step(logs["loss"], logs["grad_norm"])


def counting(collate: Callable[..., dict[str, Any]], meter: Meter) -> Callable[..., dict[str, Any]]:
    """Wrap `collate` so that the meter counts the positions of each micro-batch."""

    def collate_and_count(examples: list[Any]) -> dict[str, Any]:
        batch = collate(examples)
        meter.count(batch["input_ids"].numel())
        return batch

    return collate_and_count


def in_order(steps: Workload, micro_batch: int) -> list[Document]:
    """Return all documents in the order of the steps; those of a micro-batch have similar lengths."""
    return [
        document for step in steps.steps for batch in micro_batches(step, micro_batch) for document in batch
    ]


def rows(documents: list[Document]) -> list[dict[str, Tensor]]:
    """Convert documents to the rows of a Trainer's data set."""
    return [document._asdict() for document in documents]


def arguments(job: Job, steps: Workload, folder: str) -> dict[str, Any]:
    """Return the common TrainingArguments; they log every step, for its loss and gradient norm."""
    accumulation = len(steps.steps[0]) // job.micro_batch
    if accumulation * job.micro_batch != len(steps.steps[0]):
        raise ValueError(
            f"{len(steps.steps[0])} documents per step are not a multiple of the micro-batch size {job.micro_batch}"
        )
    return {
        "output_dir": folder,
        "per_device_train_batch_size": job.micro_batch,
        "gradient_accumulation_steps": accumulation,
        "max_steps": len(steps.steps),
        "learning_rate": job.lr,
        "lr_scheduler_type": "constant",
        "max_grad_norm": job.max_grad_norm,
        "weight_decay": 0.0,
        "optim": "adamw_torch_fused",
        "gradient_checkpointing": "ckpt" in job.flags,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if "ckpt" in job.flags else None,
        "use_cpu": job.device == "cpu",
        "train_sampling_strategy": "sequential",
        "torch_compile": "compile" in job.flags,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": job.device == "cuda",
        "seed": 0,
    }


def flags_of(used: dict[str, Any]) -> dict[str, str]:
    """Return the arguments that the report shows."""
    shown = (
        "bf16",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "optim",
        "gradient_checkpointing",
        "gradient_checkpointing_kwargs",
        "torch_compile",
        "use_liger_kernel",
        "packing",
        "padding_free",
        "max_length",
    )
    return {key: str(used[key]) for key in shown if key in used}


def dtype_of(job: Job) -> torch.dtype:
    """Return the dtype of all matrix products."""
    return getattr(torch, job.dtype)
