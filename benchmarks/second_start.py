"""Measure the time that the cache saves: load data and base at a first and a second start, in fresh processes.

    python benchmarks/second_start.py [--rows 52000] [--hidden 1024] [--layers 24]

Writes rows as long as Alpaca's and a random Llama in bf16 to a temporary folder with its own cache. Prints a Markdown
table: seconds without imports, by the clock and (in brackets) of the processor, which other work on the machine does
not lengthen; and the SHA-256 of the data and weights, which must be the same in every row. The last line is the time
to build the batches of a step, which is all that a data loader in the background could hide.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from qlora import bundled


def main() -> None:
    """Run the command line: write data and base, then start this script with `--load` for each start."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=52_000)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        print(json.dumps(load(arguments.load)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "rows.jsonl", arguments.rows)
        write_llama(folder, arguments.hidden, arguments.layers)
        print("| start | data, s (CPU) | base, s (CPU) | peak resident, GiB | SHA-256 |")
        print("|---|---:|---:|---:|---|")
        for start, cache in (
            ("without cache", "off"),
            ("first", "cache"),
            ("second", "cache"),
            ("third", "cache"),
        ):
            measured = in_a_process(folder, cache if cache == "off" else str(folder / cache))
            numbers = " | ".join(f"{clock:.2f} ({cpu:.2f})" for clock, cpu in measured["seconds"])
            numbers += f" | {measured['peak']:.2f}"
            print(f"| {start} | {numbers} | {measured['sha256'][:12]} |", flush=True)
        print(
            "\nbuilding the batches of a step, 16 packed rows of 512 tokens: "
            f"{1000 * measured['step']:.2f} ms (CPU), median"
        )


def in_a_process(folder: Path, cache: str) -> dict[str, Any]:
    """Return the measurements of `load`, run in a fresh process."""
    command = [sys.executable, __file__, "--load", str(folder)]
    environment = {**os.environ, "QLORA_CACHE": cache}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def load(folder: Path) -> dict[str, Any]:
    """Load data and base; return the seconds, the peak memory and a checksum over both."""
    import torch

    from qlora.data import Batches, load_dataset
    from qlora.model.load import load_base, load_tokenizer
    from qlora.recipe import Base, Data

    base = Base(model=str(folder), compute_dtype="bfloat16")
    tokenizer = load_tokenizer(base)
    data = Data(source=str(folder / "rows.jsonl"), packing=True)
    dataset, data_seconds = timed(lambda: load_dataset(data, tokenizer, seed=0))
    batches = Batches(
        dataset.train,
        micro_batch_size=4,
        global_batch_size=16,
        max_length=512,
        packing=True,
        pad_id=dataset.pad_id,
        seed=0,
    )
    steps = [timed(partial(batches.step, step))[1][1] for step in range(min(50, batches.steps_per_epoch))]
    model, base_seconds = timed(lambda: load_base(base))
    checksum = hashlib.sha256(dataset.fingerprint.encode())
    for tensor in model.state_dict().values():
        checksum.update(tensor.reshape(-1).view(torch.uint8).numpy())
    # Not from getrusage, whose peak includes that of the parent process
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak is not None
    return {
        "step": statistics.median(steps),
        "seconds": [data_seconds, base_seconds],
        "peak": int(peak[1]) / 2**20,
        "sha256": checksum.hexdigest(),
    }


def timed(function: Callable[[], Any]) -> tuple[Any, tuple[float, float]]:
    """Return the value of the function, and its seconds of clock and processor."""
    began = time.perf_counter(), time.process_time()
    value = function()
    return value, (time.perf_counter() - began[0], time.process_time() - began[1])


def write_rows(file: Path, count: int) -> None:
    """Write rows in the Alpaca format, of about 180 tokens each, from words of the bundled tickets."""
    tickets = bundled.path("bundled/tickets/train.jsonl").read_text().split()
    words, dice = [word for word in tickets if word.isalpha()], random.Random(0)
    with file.open("w") as stream:
        for number in range(count):
            row = {
                "instruction": " ".join(dice.choices(words, k=dice.randint(6, 20))),
                "input": " ".join(dice.choices(words, k=dice.randint(5, 25))) if number % 3 == 0 else "",
                "output": " ".join(dice.choices(words, k=3 + int(dice.lognormvariate(3.6, 0.8)))),
            }
            stream.write(json.dumps(row) + "\n")


def write_llama(folder: Path, hidden: int, layers: int) -> None:
    """Write a random Llama in bf16 with a vocabulary of 32,000, and the bundled tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for file in bundled.path("bundled/base").glob("tokenizer*"):
        shutil.copy(file, folder)


if __name__ == "__main__":
    main()
