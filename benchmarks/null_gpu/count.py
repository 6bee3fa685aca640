"""Count the kernel launches, matrix products, waits and copies of a training step, on a null GPU.

    python -m benchmarks.null_gpu -m benchmarks.null_gpu.count [--preset llama-3.1-8b]

Prints a Markdown table with one line for each layout of the rows and each choice of what to recompute. The host's
seconds are those of this machine.
"""

import argparse
import ctypes
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.speed.contenders.qlora import Session
from benchmarks.speed.prepare import Setting, prepare
from benchmarks.speed.presets import PRESETS
from benchmarks.speed.report import table
from benchmarks.speed.workload import Document, Workload
from qlora.model.checkpointing import checkpoint_layers, decoder_layers
from qlora.model.offload import HostEmbedding

COLUMNS = ("launches", "of which products", "waits", "copies to the device", "copies to the host")
"""in the order of `counters` in runtime.c"""

EMBEDDING = "all layers recomputed, inputs and embedding on the host"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--preset", default="llama-3.1-8b", choices=PRESETS)
    parser.add_argument("--cache", default="~/.cache/qlora-null-gpu/bases")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error(
            "torch finds no CUDA device: start this script with `python -m benchmarks.null_gpu -m ...`"
        )
    preset = PRESETS[arguments.preset]
    setting = Setting(preset, steps=2, cache=str(Path(arguments.cache).expanduser()))
    job = prepare(setting).job(setting)
    session = Session(job)
    whole = Workload.load(job.workload).steps[0]
    layers = len(decoder_layers(session.model))
    uneven = [shortened(document, n) for n, document in enumerate(whole)]
    forms = {
        "rows without padding": (whole, (0, 0), False),
        "  MLPs recomputed": (whole, (0, layers), False),
        "  all layers recomputed": (whole, (layers, 0), False),
        "  and their inputs on the host": (whole, (layers, 0), True),
        "rows of different lengths": (uneven, (0, 0), False),
        EMBEDDING: (whole, (layers, 0), True),
    }
    rows = []
    for name, (documents, recomputed, offload) in forms.items():
        checkpoint_layers(session.model, *recomputed, offload=offload)
        if name == EMBEDDING:  # the last form, because the embedding stays on the host
            embedding = session.model.get_input_embeddings()
            session.model.set_input_embeddings(HostEmbedding(embedding.weight, torch.device("cuda", 0)))
        session.step(0, documents)  # warms up
        counts = [0] * len(COLUMNS)
        started = time.perf_counter()
        with counted(counts):
            session.step(1, documents)
        rows.append([name, *(f"{count:,}" for count in counts), f"{time.perf_counter() - started:.2f}"])
    print(
        f"{preset.name}, {preset.sequences} x {preset.length:,} tokens in one micro-batch, {layers} layers\n"
    )
    print(table(["step", *COLUMNS, "host, s"], rows))


def shortened(document: Document, by: int) -> Document:
    """Return the document without its last `by` tokens."""
    stop = len(document.input_ids) - by
    return Document(document.input_ids[:stop], document.labels[:stop])


@contextmanager
def counted(counts: list[int]) -> Iterator[None]:
    """Add the events inside the `with` block to `counts`."""
    before = _counters()
    yield
    for number, (earlier, later) in enumerate(zip(before, _counters(), strict=True)):
        counts[number] += later - earlier


def _counters() -> list[int]:
    values = (ctypes.c_uint64 * len(COLUMNS))()
    ctypes.CDLL(None).nullgpu_counters(values)
    return list(values)


if __name__ == "__main__":
    main()
