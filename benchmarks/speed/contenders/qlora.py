"""This package, by the functions that its own loop calls.

The checkpoint is loaded with `load_base`, adapted with `adapt` (bf16 A and B, fp32 master copy in the
optimizer), and trained with `accumulate`, `Optimizer.clip` and `Optimizer.step`.
"""

import torch
from safetensors.torch import load_file
from torch import nn

from benchmarks.speed.job import Answer, Job
from benchmarks.speed.meter import Meter, contend
from benchmarks.speed.workload import Document, Workload
from qlora.adapter import adapt, trainable_parameters
from qlora.base import load_base
from qlora.data import Batch, Batches, Example
from qlora.optim import Optimizer
from qlora.recipe import Base
from qlora.step import accumulate, checkpoint_layers


def train(job: Job, meter: Meter) -> Answer:
    """Load, train every step, report."""
    base = Base(model=job.base, compute_dtype=job.dtype)
    model: nn.Module = load_base(base, job.device)
    adapt(model, rank=job.rank, alpha=job.alpha, targets="all-linear")
    parameters = trainable_parameters(model)
    with torch.no_grad():
        for name, value in load_file(job.adapter).items():
            parameters[name].copy_(value)
    if "ckpt" in job.flags:
        checkpoint_layers(model)
    optimizer = Optimizer(parameters, name="paged_adamw_32bit")
    steps = Workload.load(job.workload).steps
    meter.loaded()

    meter.begin()
    for number, documents in enumerate(steps):
        batches = lay_out(documents, job)
        optimizer.zero_grad()
        loss = accumulate(model, batches, seed=0, step=number)
        norm = optimizer.clip(job.max_grad_norm)
        loss_value, norm_value = torch.stack([loss, norm.to(loss)]).tolist()
        optimizer.step(job.lr)
        meter.step(loss_value, norm_value, sum(batch.input_ids.numel() for batch in batches))
    return meter.answer(
        parameters,
        {
            "lora_dtype": str(next(iter(parameters.values())).dtype),
            "optimizer": "paged_adamw_32bit",
            "activations": "recomputed" if "ckpt" in job.flags else "kept",
        },
    )


def lay_out(documents: list[Document], job: Job) -> list[Batch]:
    """The micro-batches of one step."""
    examples = [Example(d.input_ids.numpy(), d.labels.numpy(), "") for d in documents]
    packing = "packing" in job.flags
    # packed rows are max_length tokens wide: as many a micro-batch as hold the tokens of padded documents
    size = max(1, job.micro_batch // 2) if packing else job.micro_batch
    batches = Batches(
        examples,
        micro_batch_size=size,
        global_batch_size=-(-len(examples) // size) * size,
        max_length=job.max_length,
        packing=packing,
        pad_id=0,
        seed=0,
    )
    return batches.step(0)


if __name__ == "__main__":
    contend(train)
