"""PEFT contender, set up as PEFT's documentation describes QLoRA.

`prepare_model_for_kbit_training` (norms, embeddings and head in fp32, checkpointing with its defaults), A and B in
fp32, torch.autocast if the dtype is bfloat16, plain AdamW, an attention mask.
"""

from functools import partial

import torch
from peft import prepare_model_for_kbit_training

from benchmarks.speed.contenders.peft_loop import adapted, adapter, load, training_loop
from benchmarks.speed.job import Answer, Job
from benchmarks.speed.meter import Meter, contend
from benchmarks.speed.workload import Workload


def train(job: Job, meter: Meter) -> Answer:
    """Load the model, train every step and return the measurements."""
    model = adapted(prepare_model_for_kbit_training(load(job)), job)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=job.lr, weight_decay=0.0
    )
    steps = Workload.load(job.workload)
    meter.loaded()

    dtype = getattr(torch, job.dtype)
    precision = partial(torch.autocast, job.device, dtype=dtype, enabled=dtype != torch.float32)
    training_loop(model, job, meter, steps, optimizer, mask=True, precision=precision)
    return meter.answer(
        adapter(model),
        {
            "autocast": job.dtype if job.dtype != "float32" else "off (float32)",
            "lora_dtype": str(next(iter(adapter(model).values())).dtype),
            "optimizer": "torch.optim.AdamW",
        },
    )


if __name__ == "__main__":
    contend(train)
