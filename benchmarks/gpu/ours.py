"""Time a step of ours in every form: rows dense or packed, recomputation, offload, dropout.

All forms run in one process, one after the other, on one model. Each has the seconds of a step, those of the host, the
peak of allocated memory, the loss, the attention operators and the state of every kernel.
"""

import time
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch

from benchmarks.gpu.lines import Write, arguments, lines
from benchmarks.gpu.work import STEPS, WARMUP, cut, job_of
from benchmarks.speed.contenders.qlora import Session
from benchmarks.speed.paths import AttentionSeen, check_kernels, kernel_states
from benchmarks.speed.workload import Document, Workload
from qlora.adapter import lora_layers
from qlora.model.checkpointing import checkpoint_layers, decoder_layers

PIECES = 6
"""documents of a packed row"""
FEW = 64
"""tokens of a step that has the launches of a whole one and almost no work for the GPU"""


@dataclass(frozen=True)
class Form:
    """One way to take the same step."""

    recomputed: str = "nothing"
    offload: bool = False
    packing: bool = False
    dropout: float = 0.0


FORMS = (
    Form(),
    Form(packing=True),
    Form(dropout=0.1),
    Form("mlp"),
    Form("all"),
    Form("all", offload=True),
    Form("all", packing=True),
    Form(packing=True, dropout=0.1),
    Form("mlp", dropout=0.1),
    Form("all", dropout=0.1),
)


def main() -> None:
    """Run the command line."""
    options, write = arguments(__doc__), lines()
    started = time.perf_counter()
    job = job_of(options)
    prepared = time.perf_counter()
    session, steps = Session(job), Workload.load(job.workload).steps
    write({"prepare_s": prepared - started, "load_s": time.perf_counter() - prepared, "base": job.base})
    for form in FORMS:
        measure(session, steps, form, write)


def measure(session: Session, steps: list[list[Document]], form: Form, write: Write) -> None:
    """Take some steps in this form, and write their line: or the error, so that the next form follows."""
    line: dict[str, Any] = dict(vars(form))
    try:
        write(line | timed(session, steps, form))
    except Exception as error:  # noqa: BLE001 - the error is the result
        write(line | {"error": f"{type(error).__name__}: {error}".splitlines()[0]})


def timed(session: Session, steps: list[list[Document]], form: Form) -> dict[str, Any]:
    """Return the measurements of a form.

    Raises:
        RuntimeError: A kernel fell back to plain torch.
    """
    layers = len(decoder_layers(session.model))
    whole, mlps = {"nothing": (0, 0), "mlp": (0, layers), "all": (layers, 0)}[form.recomputed]
    checkpoint_layers(session.model, whole, mlps, offload=form.offload)
    for layer in lora_layers(session.model).values():
        layer.spec = replace(layer.spec, dropout=form.dropout)
    session.job = replace(session.job, flags=("packing",) if form.packing else ())
    cuda = session.job.device == "cuda"
    attention, seconds, losses, tokens = AttentionSeen(), [], [], 0
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for number in range(WARMUP + STEPS):
        documents = cut(steps[number], PIECES) if form.packing else steps[number]
        if number == 0:
            with attention:
                loss, _, _ = session.step(number, documents)
            continue
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        loss, _, tokens = session.step(number, documents)
        if cuda:
            torch.cuda.synchronize()
        if number >= WARMUP:
            seconds.append(time.perf_counter() - start)
            losses.append(loss)
    memory = {
        "allocated_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "reserved_bytes": torch.cuda.max_memory_reserved() if cuda else None,
    }
    kernels = kernel_states(session.job.device)
    check_kernels(kernels)
    host = host_seconds(session, steps[0], form, cuda)
    return memory | {
        "step_s": median(seconds), "seconds": seconds, "tokens_per_s": tokens / median(seconds),
        "loss": losses, "attention": str(attention), "kernels": kernels,
        "host_s": host,
    }  # fmt: skip


def host_seconds(session: Session, documents: list[Document], form: Form, cuda: bool) -> float:
    """Return the seconds in which the host launches a step: those of a step with FEW tokens, the fastest of three."""
    ids, labels = documents[0]
    few = [Document(ids[:FEW], labels[:FEW])]
    if form.packing:
        few = cut(few, PIECES)
    best = float("inf")
    for number in range(3):
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        session.step(WARMUP + STEPS + number, few)
        if cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


if __name__ == "__main__":
    main()
