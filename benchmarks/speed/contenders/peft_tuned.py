"""PEFT contender tuned by hand.

The compute dtype throughout (also for A and B), no upcasts, no autocast, fused AdamW, non-reentrant checkpointing or
none. No attention mask, because padding is on the right.
"""

import torch
from torch import nn

from benchmarks.speed.contenders.peft_loop import adapted, adapter, load, training_loop
from benchmarks.speed.job import Answer, Job
from benchmarks.speed.meter import Meter, contend
from benchmarks.speed.workload import Workload


def train(job: Job, meter: Meter) -> Answer:
    """Load the model, train every step and return the measurements."""
    model, optimizer = tuned(job)
    steps = Workload.load(job.workload)
    meter.loaded()

    training_loop(model, job, meter, steps, optimizer, mask=False)
    return meter.answer(adapter(model), settings(model))


def tuned(job: Job) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return the model with its adapter, and its optimizer."""
    model = adapted(load(job), job, getattr(torch, job.dtype))
    if "ckpt" in job.flags:
        recompute(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.AdamW(trainable, lr=job.lr, weight_decay=0.0, fused=True)


def recompute(model: nn.Module) -> None:
    """Turn on checkpointing of every layer, under the name that this version of transformers uses."""
    named = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{named}_checkpointing_enable")({"use_reentrant": False})


def settings(model: nn.Module) -> dict[str, str]:
    """Return the settings that the report shows."""
    return {
        "autocast": "off",
        "lora_dtype": str(next(iter(adapter(model).values())).dtype),
        "optimizer": "torch.optim.AdamW(fused=True)",
    }


if __name__ == "__main__":
    contend(train)
