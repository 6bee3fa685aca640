"""Protocol between the benchmark and the processes of its contenders: a job, and an answer.

A contender is a separate program. It is started as `python -m <module> JOB.json`, trains every step of the job's
workload in order, and prints one JSON object, its `Answer`, to standard output. This module does not import torch, so
that the measured import time is the contender's alone.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self


@dataclass(frozen=True)
class Job:
    """Work of one contender in one process."""

    base: str
    """folder of the NF4 checkpoint, in the Hugging Face layout"""
    adapter: str
    """safetensors file with the initial `<layer>.lora_a` [rank, in] and `<layer>.lora_b` [out, rank]"""
    workload: str
    """safetensors file, see `workload.py`"""
    device: str
    dtype: str
    """dtype of all matrix products: float32 or bfloat16"""
    rank: int
    alpha: float
    warmup: int
    """number of first steps that are not timed"""
    micro_batch: int
    """sequences of one forward and backward pass"""
    max_length: int
    """tokens of the longest sequence, and of a packed row"""
    lr: float
    max_grad_norm: float
    flags: tuple[str, ...] = ()
    """flags of the contender: ckpt, mlp, packing, compile, liger, selective, offload"""
    started: float = 0.0
    """time.time() at the start of the process"""

    @classmethod
    def read(cls, path: str) -> Self:
        """Read a job from a JSON file."""
        settings = json.loads(Path(path).read_text())
        return cls(**settings | {"flags": tuple(settings["flags"])})

    def to_json(self) -> str:
        """Return the job as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=1)


@dataclass(frozen=True)
class Answer:
    """Measurements of one contender in one process. Lists have one entry per step, warm-up first."""

    losses: list[float] = field(default_factory=list)
    """nats per supervised token"""
    grad_norms: list[float] = field(default_factory=list)
    """norm before clipping"""
    seconds: list[float] = field(default_factory=list)
    """time from the end of the previous step, or the start of training, to the end of this step"""
    positions: int = 0
    """tokens computed by the model in all steps, padding included"""
    adapter_change: float = 0.0
    """L2 norm of the total change of all A and B"""
    import_seconds: float = 0.0
    load_seconds: float = 0.0
    memory: dict[str, int] = field(default_factory=dict)
    """bytes by phase; see `meter.py`"""
    processor_seconds: list[float] = field(default_factory=list)
    """processor time of the process in each step, of all its threads"""
    settings: dict[str, Any] = field(default_factory=dict)
    """settings of the contender for the report"""
    error: str | None = None
    """reason for missing measurements"""
    missing: bool = False
    """true if the error is only that a package is not installed"""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse the answer on the last line of a contender's standard output."""
        return cls(**json.loads(text.strip().splitlines()[-1]))

    def to_json(self) -> str:
        """Return the answer as JSON on one line."""
        return json.dumps(dataclasses.asdict(self))
