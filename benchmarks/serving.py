"""Measure `qlora serve`: tokens a second of one client and of several, with one adapter and with two.

    python benchmarks/serving.py [--base bundled | qwen3-0.6b] [--layers 4] [--clients 8] [--tokens 48] [--rounds 3]

Writes two adapters of random values for the base, starts `qlora serve` in a process of its own, and asks it through
OpenAI's client with a thread for each client. All answers are greedy and have the same number of tokens, if no end
token comes before. A base other than the bundled one has random NF4 weights in LAYERS layers of that architecture, with
the bundled tokenizer's vocabulary. A line is the median of its rounds, which alternate. Prints a Markdown table.

`first` is the time to the first text of a stream. `memory` is the peak of the server's resident memory so far.
"""

import argparse
import json
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import openai
import torch
from torch import nn

from qlora import bundled
from qlora.adapter import lora_layers, save_adapter
from qlora.adapter.identity import BaseIdentity
from qlora.data import prompt_digests
from qlora.model.load import load_base, load_tokenizer
from qlora.model.prepare import apply_adapter
from qlora.recipe import Recipe
from qlora.runtime.environment import package_version

MIB = 2**20
QUESTION = "My lamp broke on Friday. I am tired of this."


@dataclass(frozen=True)
class Measured:
    """One round of clients that ask at the same time."""

    tokens_per_s: float
    first_s: float
    memory_bytes: int


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--base", default="bundled", help="bundled, or an architecture that the package ships"
    )
    parser.add_argument("--layers", type=int, default=4, help="number of decoder layers of an architecture")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48, help="tokens of each answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32", help="base.compute_dtype")
    arguments = parser.parse_args()
    cases = {
        "1 client": ["one"],
        f"{arguments.clients} clients, one adapter": ["one"] * arguments.clients,
        f"{arguments.clients} clients, two adapters": ["one", "two"] * (arguments.clients // 2),
    }
    with tempfile.TemporaryDirectory() as name:
        runs = write_runs(Path(name), arguments.base, arguments.layers, arguments.dtype)
        with serving(runs, arguments.clients) as (url, process, said):
            rounds: dict[str, list[Measured]] = {case: [] for case in cases}
            measure(url, process, ["one", "two"], arguments.tokens)
            for _ in range(arguments.rounds):
                for case, models in cases.items():
                    rounds[case].append(measure(url, process, models, arguments.tokens))
    print(f"{said}\n")
    print("| | tokens/s | ratio | first, s | memory, MiB |\n|---|---:|---:|---:|---:|")
    alone = statistics.median(each.tokens_per_s for each in rounds["1 client"])
    for case, found in rounds.items():
        speed = statistics.median(each.tokens_per_s for each in found)
        first = statistics.median(each.first_s for each in found)
        memory = max(each.memory_bytes for each in found) / MIB
        print(f"| {case} | {speed:.1f} | {speed / alone:.2f} | {first:.2f} | {memory:,.0f} |")
    print(f"\nqlora {package_version()}, torch {torch.__version__}, openai {openai.__version__}")


def write_runs(folder: Path, base: str, layers: int, dtype: str) -> dict[str, Path]:
    """Write the folders of two finished runs with random adapters."""
    model = "bundled/base"
    settings = []
    if base != "bundled":
        place = folder / "base"
        place.mkdir()
        config = json.loads(bundled.path(f"bundled/configs/{base}.json").read_text())
        small = json.loads(bundled.path("bundled/base/config.json").read_text())
        ids = {name: small[name] for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
        (place / "config.json").write_text(json.dumps({**config, **ids, "num_hidden_layers": layers}))
        for file in bundled.path("bundled/base").glob("tokenizer*"):
            shutil.copy(file, place)
        model = str(place)
        settings = ["base.init=synthetic"]
    runs = {}
    for seed, name in enumerate(("one", "two")):
        output = folder / name
        common = [f"base.model={model}", f"base.compute_dtype={dtype}", f"output={output}"]
        recipe = Recipe.load("quickstart", [*common, *settings])
        adapted = randomized(apply_adapter(load_base(recipe.base), recipe), seed)
        prompts = prompt_digests(recipe.data, load_tokenizer(recipe.base))
        save_adapter(adapted, output / "adapter", base=replace(BaseIdentity.of(adapted), **prompts))
        (output / "adapter" / "recipe.yaml").write_text(recipe.to_yaml())
        runs[name] = output
    return runs


def randomized(model: nn.Module, seed: int) -> nn.Module:
    """Fill every B with small random numbers, so that the adapters' answers differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_b.copy_(torch.randn(layer.lora_b.shape, generator=generator) * 0.02)
    return model


@contextmanager
def serving(runs: dict[str, Path], parallel: int) -> Iterator[tuple[str, int, str]]:
    """Run `qlora serve`; yield its address, its process id, and what it says of its memory."""
    first, second = runs
    command = [
        sys.executable,
        "-m",
        "qlora",
        "serve",
        str(runs[first]),
        "--adapter",
        f"{second}={runs[second]}",
    ]
    options = ["--port", "0", "--parallel", str(parallel), "--context", "256"]
    with subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said: list[str] = []
        while not said or not said[-1].startswith("address"):
            if not (line := process.stderr.readline()):
                sys.exit("".join(said))
            said.append(line)
        reader = threading.Thread(target=process.stderr.read)  # its log
        reader.start()
        try:
            memory = next(line.strip() for line in said if line.startswith("memory"))
            yield said[-1].split()[1], process.pid, memory
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
            reader.join()


def measure(url: str, process: int, models: Sequence[str], tokens: int) -> Measured:
    """Let one client for each of `models` ask at the same time; return their tokens a second together."""
    counted: list[int] = []
    firsts: list[float] = []
    ready = threading.Barrier(len(models) + 1)

    def ask(model: str) -> None:
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=3600) as client:
            ready.wait()
            began = time.perf_counter()
            stream = client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": QUESTION}],
                temperature=0,
                max_tokens=tokens,
                stream=True,
                stream_options={"include_usage": True},
            )
            first = None
            for chunk in stream:
                if first is None and chunk.choices and chunk.choices[0].delta.content:
                    first = time.perf_counter() - began
                if chunk.usage is not None:
                    counted.append(chunk.usage.completion_tokens)
            firsts.append(first or 0.0)

    threads = [threading.Thread(target=ask, args=[model]) for model in models]
    for thread in threads:
        thread.start()
    ready.wait()
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    return Measured(sum(counted) / seconds, statistics.median(firsts), peak_bytes(process))


def peak_bytes(process: int) -> int:
    """Return the peak of a process's resident memory."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024


if __name__ == "__main__":
    main()
