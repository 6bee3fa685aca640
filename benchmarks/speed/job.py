"""What a contender is asked, and what it answers: the protocol between the benchmark and its processes.

A contender is a program of its own. It is started as `python -m <module> JOB.json`, trains every step of the
job's workload in order, and prints one JSON object, its `Answer`, on standard output. Light on purpose: nothing
here imports torch, so that a contender's imports are its own.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self


@dataclass(frozen=True)
class Job:
    """One contender's work in one process."""

    base: str
    """folder of the NF4 checkpoint, in the Hugging Face layout"""
    adapter: str
    """safetensors: `<layer>.lora_a` [rank, in] and `<layer>.lora_b` [out, rank], from which all start"""
    workload: str
    """safetensors, see `workload.py`"""
    device: str
    dtype: str
    """of all products: float32 or bfloat16"""
    rank: int
    alpha: float
    warmup: int
    """first steps, which are not timed"""
    micro_batch: int
    """sequences of one forward and backward pass"""
    max_length: int
    """tokens of the longest sequence; of a packed row"""
    lr: float
    max_grad_norm: float
    flags: tuple[str, ...] = ()
    """of the contender: ckpt, mlp, packing, compile, liger, selective, offload"""
    started: float = 0.0
    """time.time() when the process was started"""

    @classmethod
    def read(cls, path: str) -> Self:
        """The job in a JSON file."""
        settings = json.loads(Path(path).read_text())
        return cls(**settings | {"flags": tuple(settings["flags"])})

    def to_json(self) -> str:
        """The job as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=1)


@dataclass(frozen=True)
class Answer:
    """What one contender measured in one process. A step's lists have one entry a step, warm-up first."""

    losses: list[float] = field(default_factory=list)
    """nats a supervised token"""
    grad_norms: list[float] = field(default_factory=list)
    """before clipping"""
    seconds: list[float] = field(default_factory=list)
    """from the end of the step before (or the beginning of training) to the end of this one"""
    positions: int = 0
    """tokens that went through the model, padding included, all steps together"""
    adapter_change: float = 0.0
    """L2 norm of what all steps changed in all A and B"""
    import_seconds: float = 0.0
    load_seconds: float = 0.0
    memory: dict[str, int] = field(default_factory=dict)
    """bytes; see `meter.py`"""
    settings: dict[str, Any] = field(default_factory=dict)
    """what the contender wants a reader to know about how it was set up"""
    error: str | None = None
    """why there are no numbers"""
    missing: bool = False
    """whether the error is only that a package is not installed"""

    @classmethod
    def parse(cls, text: str) -> Self:
        """The answer on the last line of a contender's standard output."""
        return cls(**json.loads(text.strip().splitlines()[-1]))

    def to_json(self) -> str:
        """The answer as JSON, on one line."""
        return json.dumps(dataclasses.asdict(self))
