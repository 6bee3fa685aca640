"""The work of the record: model, tokens and the shared checkpoint, the same for our package and for its peers."""

import argparse
from pathlib import Path

from benchmarks.speed.job import Job
from benchmarks.speed.prepare import Setting, prepare
from benchmarks.speed.presets import PRESETS
from benchmarks.speed.workload import Document

WARMUP, STEPS = 2, 3


def job_of(options: argparse.Namespace) -> Job:
    """Return the job: Llama 3.1 8B with one row of 4,096 tokens a step; tiny sizes with --tiny."""
    preset = PRESETS["tiny" if options.tiny else "llama-3.1-8b"]
    if not options.tiny:
        preset = preset.change(sequences=1, length=4096)
    cache = str(Path(options.cache).expanduser())
    setting = Setting(
        preset, steps=WARMUP + STEPS, dtype="float32" if options.device == "cpu" else "bfloat16",
        device=options.device, cache=cache,
    )  # fmt: skip
    return prepare(setting).job(setting, warmup=WARMUP)


def cut(documents: list[Document], pieces: int) -> list[Document]:
    """Cut each document into some of different lengths, which fill a packed row together."""
    shares = [2 * (number + 1) / (pieces * (pieces + 1)) for number in range(pieces)]
    found = []
    for document in documents:
        start, whole = 0, len(document.input_ids)
        for number, share in enumerate(shares):
            stop = whole if number == pieces - 1 else start + max(2, int(share * whole))
            ids, labels = document.input_ids[start:stop], document.labels[start:stop].clone()
            labels[0] = -100
            found.append(Document(ids, labels))
            start = stop
    return found
