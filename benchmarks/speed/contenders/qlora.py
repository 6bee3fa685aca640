"""This package, by the functions that its own loop calls.

The checkpoint is loaded with `load_base`, adapted with `adapt` (bf16 A and B, fp32 master copy in the optimizer),
given our layers with `use_fused_layers`, and trained with `accumulate`, `Optimizer.clip` and `Optimizer.step`.
"""

from collections.abc import Sequence

import torch
from safetensors.torch import load_file

from benchmarks.speed.contenders import Contender
from benchmarks.speed.job import Answer, Job
from benchmarks.speed.meter import Meter, contend
from benchmarks.speed.workload import Document, Workload
from qlora.adapter import LoraSpec, adapt, trainable_parameters
from qlora.data import Batch, Batches, Example
from qlora.model import varlen_attention
from qlora.model.checkpointing import checkpoint_layers, decoder_layers
from qlora.model.decoder_layer import use_fused_layers
from qlora.model.load import load_base
from qlora.objective.checks import read_documents_if_apart
from qlora.objective.step import accumulate
from qlora.optim import Optimizer
from qlora.recipe import Base
from qlora.runtime.allocators import grow_by_pages, keep_freed_memory

OPTIMIZER = "paged_adamw_32bit"


class Session:
    """The model and its optimizer, ready for the first step."""

    def __init__(self, job: Job) -> None:
        self.job = job
        if job.device == "cpu":
            keep_freed_memory()
        else:
            grow_by_pages()
        offload = "offload" in job.flags
        base = Base(model=job.base, compute_dtype=job.dtype, embedding="host" if offload else "device")
        self.model = load_base(base, job.device)
        read_documents_if_apart(self.model)
        adapt(self.model, LoraSpec(rank=job.rank, alpha=job.alpha, targets="all-linear"))
        self.parameters = trainable_parameters(self.model)
        with torch.no_grad():
            for name, value in load_file(job.adapter).items():
                self.parameters[name].copy_(value)
        use_fused_layers(self.model)
        if "ckpt" in job.flags:
            checkpoint_layers(self.model, offload=offload)
        elif "mlp" in job.flags:
            checkpoint_layers(self.model, 0, len(decoder_layers(self.model)))
        self.optimizer = Optimizer(self.parameters, name=OPTIMIZER)
        if job.device == "cuda":
            torch.cuda.empty_cache()

    def step(self, number: int, documents: Sequence[Document]) -> tuple[float, float, int]:
        """One optimizer step: its loss, its gradient norm, the positions that went through the model."""
        batches = lay_out(documents, self.job)
        self.optimizer.zero_grad()
        loss = accumulate(self.model, batches, seed=0, step=number).sum
        norm = self.optimizer.clip(self.job.max_grad_norm)
        loss_value, norm_value = torch.stack([loss, norm.to(loss)]).tolist()
        self.optimizer.step(self.job.lr)
        padded = self.model.config._attn_implementation != varlen_attention.NAME
        positions = sum(batch.input_ids.numel() if padded else batch.tokens for batch in batches)
        return loss_value, norm_value, positions


def train(job: Job, meter: Meter) -> Answer:
    """Load, train every step, report."""
    session = Session(job)
    steps = Workload.load(job.workload).steps
    meter.loaded()

    meter.begin()
    for number, documents in enumerate(steps):
        meter.step(*session.step(number, documents))
    parameters = session.parameters
    return meter.answer(
        parameters,
        {
            "lora_dtype": str(next(iter(parameters.values())).dtype),
            "optimizer": OPTIMIZER,
            "recomputed": Contender("qlora", job.flags).recomputed,
        },
    )


def lay_out(documents: Sequence[Document], job: Job) -> list[Batch]:
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
