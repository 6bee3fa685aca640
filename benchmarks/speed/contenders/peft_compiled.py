"""PEFT contender tuned by hand, with torch.compile.

Dense tokens have one shape. Real data has many, so row lengths are padded to a multiple of 32 and shapes are compiled
as dynamic. Compilation is the time by which the first step exceeds a usual one.
"""

from typing import Any

import torch

from benchmarks.speed.contenders.peft_loop import adapter, training_loop
from benchmarks.speed.contenders.peft_tuned import settings, tuned
from benchmarks.speed.job import Answer, Job
from benchmarks.speed.meter import Meter, contend
from benchmarks.speed.workload import Workload


def train(job: Job, meter: Meter) -> Answer:
    """Load the model, train every step and return the measurements."""
    model, optimizer = tuned(job)
    steps = Workload.load(job.workload)
    one_shape = len({length for step in steps.lengths() for length in step}) == 1
    compiled: Any = torch.compile(model, dynamic=False if one_shape else None)
    meter.loaded()

    training_loop(compiled, job, meter, steps, optimizer, mask=False, multiple=1 if one_shape else 32)
    return meter.answer(adapter(model), settings(model) | {"dynamic": str(not one_shape)})


if __name__ == "__main__":
    contend(train)
