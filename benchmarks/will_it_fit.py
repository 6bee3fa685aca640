"""Print the longest row that fits on a card, for three models and three cards: the README's "Will it fit?" table.

    python benchmarks/will_it_fit.py                   any machine, a few minutes; nothing is downloaded
    python benchmarks/will_it_fit.py --models 8B --cards 24

Each cell is a forecast of the shipped recipe (rank 64 on all linear layers, NF4 with double quantization, paged AdamW)
with one row in a micro-batch and all layers recomputed: first with everything on the GPU, then with layer inputs and
the input embedding in host memory. `--out benchmarks/reports` writes will_it_fit_<yyyy-mm>.md there.
"""

import argparse
import platform
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from qlora import bundled
from qlora.memory.advice import Advisor
from qlora.memory.architecture import architecture
from qlora.memory.forecast import Forecaster
from qlora.memory.plan import needed
from qlora.memory.workload import assumed
from qlora.recipe import Recipe

MODELS = {
    "8B (Llama 3.1)": "llama-3.1-8b",
    "33B (LLaMA)": "llama-33b",
    "70B (Llama 3.1)": "llama-3.1-70b",
}
CARDS_GIB = (24, 48, 80)
SHORTEST = 64
COMMON = [
    "training.micro_batch_size=1",
    "training.activation_checkpointing=full",
    f"data.max_length={SHORTEST}",
]
WAYS = {"on the GPU": [], "with offloading": ["training.activation_offloading=true", "base.embedding=host"]}
GIB = 2**30


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", nargs="+", help="prefixes of model names", default=[""])
    parser.add_argument("--cards", nargs="+", type=int, default=list(CARDS_GIB), help="GiB")
    parser.add_argument("--out", type=Path, help="folder for the report; default: only print")
    arguments = parser.parse_args()
    models = {name: recipe for name, recipe in MODELS.items() if name.startswith(tuple(arguments.models))}
    lines = list(table(models, arguments.cards))
    print("\n".join(lines))
    if arguments.out:
        today = datetime.now(UTC)
        versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "bitsandbytes"))
        note = (
            f"Forecasts, made without a GPU by `python benchmarks/will_it_fit.py` on {today:%Y-%m-%d} "
            f"(Python {platform.python_version()}, {versions}); see benchmarks/will_it_fit.py for the settings."
        )
        file = arguments.out / f"will_it_fit_{today:%Y-%m}.md"
        file.write_text("\n".join(["# Will it fit?", "", *lines, "", note, ""]))


def table(models: dict[str, str], cards: list[int]) -> Iterator[str]:
    """Yield the lines of a Markdown table: one row per model, one column per card."""
    yield "| longest row, tokens | " + " | ".join(f"{card} GiB" for card in cards) + " |"
    yield "|---|" + "---:|" * len(cards)
    for name, recipe in models.items():
        longest = {way: longest_rows(recipe, settings, cards) for way, settings in WAYS.items()}
        cells = [cell(*(longest[way][card] for way in WAYS)) for card in cards]
        yield f"| {name} | " + " | ".join(cells) + " |"


def longest_rows(name: str, settings: list[str], cards: list[int]) -> dict[int, int]:
    """Return the tokens of the longest row that fits on each card for a shipped recipe; 0 if none fits."""
    recipe = Recipe.load(
        name, [*COMMON, *settings, f"base.model={bundled.path(f'bundled/configs/{name}.json')}"]
    )
    forecaster, workload = Forecaster(architecture(recipe, cuda=True), cuda=True), assumed(recipe)
    found = {}
    for card in cards:
        fits = needed(forecaster.forecast(recipe, workload)) <= card * GIB
        found[card] = Advisor(recipe, workload, forecaster, card * GIB).longest_rows() if fits else 0
    return found


def cell(on_gpu: int, offloaded: int) -> str:
    """Return both numbers as text; one number if offloading changes nothing."""
    if not offloaded:
        return "no"
    if not on_gpu:
        return f"offloaded: {offloaded:,}"
    return f"{on_gpu:,}" if on_gpu == offloaded else f"{on_gpu:,} (offloaded: {offloaded:,})"


if __name__ == "__main__":
    main()
