"""Measure the memory in which a large data set is prepared: rows are read one by one, tokens lie in mapped files.

    python benchmarks/data_memory.py [--rows 300000] [--tokens 2000] [--tokenizer words] [--folder /big/disk]

Writes one JSON list to a temporary folder, tokenizes it in a fresh process with its own cache, and loads it again from
the cache in another. Prints a Markdown table: seconds, tokens, and the peak of resident memory, sampled every 20 ms.
`own` is the memory of the process itself (RssAnon in /proc/self/status): it must exist. `all` adds the pages of mapped
files, of the libraries and of the tokens, which the system takes back when it needs room. The first line is the memory
after the imports alone.

The tokenizer `words` has a token for each word: it is fast, and its results take as much memory for each token as those
of the bundled one (`bundled`).
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

GIB = 2**30
SAMPLED_EVERY_S = 0.02
TOKENS_PER_WORD = {"words": 1.0, "bundled": 1.3}


def main() -> None:
    """Run the command line: write the rows, then start this script with `--load` for each start."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--tokens", type=int, default=2_000, help="tokens of a row, on average")
    parser.add_argument("--tokenizer", choices=["words", "bundled"], default="words")
    parser.add_argument("--folder", help="folder for the temporary files: about 12 bytes for each token")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        print(json.dumps(load(arguments.load, arguments.tokenizer)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        file = Path(name) / "rows.json"
        write_list(file, arguments.rows, arguments.tokens, TOKENS_PER_WORD[arguments.tokenizer])
        size = file.stat().st_size / GIB
        print(f"{arguments.rows:,} rows in a JSON list of {size:.2f} GiB\n")
        print("| start | seconds | tokens | own, GiB | all, GiB |")
        print("|---|---:|---:|---:|---:|")
        for start in ("first: tokenize", "second: from the cache"):
            found = in_a_process(file, arguments.tokenizer)
            if start.startswith("first"):
                print(f"| imports alone | | | {found['own_before']:.2f} | {found['all_before']:.2f} |")
            print(
                f"| {start} | {found['seconds']:.0f} | {found['tokens']:,} | {found['own']:.2f} | {found['all']:.2f} |",
                flush=True,
            )


def words() -> list[str]:
    """Return the words of the bundled data, as often as they occur."""
    from qlora import bundled

    return [
        word
        for line in bundled.path("bundled/tickets/train.jsonl").read_text().splitlines()
        for message in json.loads(line)["messages"]
        for word in message["content"].split()
    ]


def write_list(file: Path, rows: int, tokens: int, tokens_per_word: float) -> None:
    """Write a list of objects with one text each, of ten random paragraphs."""
    known = words()
    generator = random.Random(0)
    tenth = int(tokens / tokens_per_word / 10)
    paragraphs = [" ".join(generator.choices(known, k=tenth)) for _ in range(1000)]
    with file.open("w") as stream:
        for number in range(rows):
            text = " ".join(generator.choices(paragraphs, k=10))
            stream.write(("[" if number == 0 else ",\n") + json.dumps({"text": text}))
        stream.write("]\n")


def in_a_process(file: Path, tokenizer: str) -> dict[str, Any]:
    """Load the data in a fresh process."""
    environment = {**os.environ, "QLORA_CACHE": str(file.parent / "cache"), "QLORA_CACHE_GIB": "100"}
    command = [sys.executable, __file__, "--load", str(file), "--tokenizer", tokenizer]
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


def load(file: Path, name: str) -> dict[str, Any]:
    """Load the data in this process, and return time, tokens and peak memory."""
    from qlora.data import Batches, load_dataset
    from qlora.model.load import load_tokenizer
    from qlora.recipe import Base, Data

    tokenizer = whole_words() if name == "words" else load_tokenizer(Base(model="bundled/base"))
    section = Data(source=str(file), format="text", max_length=4096, held_out=100)
    own_before, all_before = resident()
    peak = Peak()
    began = time.perf_counter()
    with peak:
        dataset = load_dataset(section, tokenizer, seed=0)
        batches = Batches(
            dataset.train, micro_batch_size=4, global_batch_size=16, max_length=4096, packing=True,
            pad_id=dataset.pad_id, seed=0,
        )  # fmt: skip
        for step in range(20):
            batches.step(step)
    return {
        "seconds": time.perf_counter() - began,
        "tokens": dataset.counts.tokens,
        "own_before": own_before / GIB,
        "all_before": all_before / GIB,
        "own": peak.own / GIB,
        "all": peak.all / GIB,
    }


def whole_words() -> Any:
    """Return a tokenizer with a token for each word of the bundled data."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["<unk>", "</s>", *sorted(set(words()))])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")


class Peak:
    """Context that samples the resident memory of this process in a thread."""

    def __init__(self) -> None:
        self.own = self.all = 0
        self._ended = threading.Event()

    def __enter__(self) -> "Peak":
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._ended.wait(SAMPLED_EVERY_S):
            own, everything = resident()
            self.own, self.all = max(self.own, own), max(self.all, everything)


def resident() -> tuple[int, int]:
    """Return the resident bytes of this process: its own, and with those of mapped files."""
    lines = dict(
        line.split(":\t") for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line
    )
    own, everything = (int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "VmRSS"))
    return own, everything


if __name__ == "__main__":
    main()
