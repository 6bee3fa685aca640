"""This package as a contender, through the functions that its own training loop calls.

`build` makes model and optimizer, as in a run: A and B in bf16, an fp32 master copy in the optimizer. `accumulate`,
`Optimizer.clip` and `Optimizer.step` train them.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from safetensors.torch import load_file

from benchmarks.speed.contenders import Contender
from benchmarks.speed.job import Answer, Job
from benchmarks.speed.meter import Meter, contend
from benchmarks.speed.paths import AttentionSeen, check_kernels, kernel_states
from benchmarks.speed.workload import Document, Workload
from qlora.adapter import trainable_parameters
from qlora.data import Batch, Batches, Example
from qlora.model import varlen_attention
from qlora.model.prepare import build
from qlora.objective.apart import read_documents_if_apart
from qlora.objective.step import accumulate
from qlora.recipe import Recipe
from qlora.runtime.allocators import grow_by_pages, keep_freed_memory

OPTIMIZER = "paged_adamw_32bit"


class Session:
    """A model and its optimizer, ready for the first step."""

    def __init__(self, job: Job) -> None:
        self.job = job
        if job.device == "cpu":
            keep_freed_memory()
        else:
            grow_by_pages()
        self.model, self.optimizer = build(recipe_of(job), job.device)
        read_documents_if_apart(self.model)
        self.parameters = trainable_parameters(self.model)
        with torch.no_grad():
            for name, value in load_file(job.adapter).items():
                self.parameters[name].copy_(value)
        if job.device == "cuda":
            torch.cuda.empty_cache()

    def step(self, number: int, documents: Sequence[Document]) -> tuple[float, float, int]:
        """Run one optimizer step; return its loss, its gradient norm and the positions computed by the model."""
        batches = lay_out(documents, self.job)
        self.optimizer.zero_grad()
        loss = accumulate(self.model, batches, seed=0, step=number).sum
        norm = self.optimizer.clip(self.job.max_grad_norm)
        loss_value, norm_value = torch.stack([loss, norm.to(loss)]).tolist()
        self.optimizer.step(self.job.lr)
        padded = self.model.config._attn_implementation != varlen_attention.NAME
        positions = sum(batch.input_ids.numel() if padded else batch.tokens for batch in batches)
        return loss_value, norm_value, positions


def recipe_of(job: Job) -> Recipe:
    """Convert a job to a recipe with the keys that `build` reads."""
    recomputed = "full" if "ckpt" in job.flags else "mlp" if "mlp" in job.flags else "none"
    offload = "offload" in job.flags
    return Recipe.from_dict(
        {
            "base": {
                "model": job.base, "compute_dtype": job.dtype, "embedding": "host" if offload else "device",
            },
            "adapter": {"rank": job.rank, "alpha": job.alpha, "targets": "all-linear"},
            "data": {"source": job.workload},
            "training": {
                "activation_checkpointing": recomputed,
                "activation_offloading": offload and recomputed == "full",
            },
            "optimizer": {"name": OPTIMIZER},
        }
    )  # fmt: skip


def train(job: Job, meter: Meter) -> Answer:
    """Load the model, train every step and return the measurements.

    Raises:
        RuntimeError: A kernel fell back to plain torch.
    """
    session = Session(job)
    steps = Workload.load(job.workload).steps
    meter.loaded()

    meter.begin()
    attention = AttentionSeen()
    for number, documents in enumerate(steps):
        with attention if number == 0 and job.warmup else nullcontext():  # it slows the host down
            taken = session.step(number, documents)
        meter.step(*taken)
    kernels = kernel_states(job.device)
    check_kernels(kernels)
    parameters = session.parameters
    return meter.answer(
        parameters,
        {
            "lora_dtype": str(next(iter(parameters.values())).dtype),
            "optimizer": OPTIMIZER,
            "recomputed": Contender("qlora", job.flags).recomputed,
            "attention": str(attention) if job.warmup else "not recorded",
            "kernels": kernels,
        },
    )


def lay_out(documents: Sequence[Document], job: Job) -> list[Batch]:
    """Return the micro-batches of one step."""
    examples = [Example(d.input_ids.numpy(), d.labels.numpy(), "") for d in documents]
    packing = "packing" in job.flags
    # A packed row has max_length tokens: half as many rows hold about the tokens of a padded micro-batch
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
