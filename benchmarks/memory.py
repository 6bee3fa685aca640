"""Compare the memory of full fine-tuning, LoRA and QLoRA at 7B to 65B: rule of thumb, forecast, measurement.

    python benchmarks/memory.py                        forecasts only: any machine, a minute or two
    python benchmarks/memory.py --measure              needs a GPU: also runs QLoRA and measures it

A second table shows options of QLoRA that use more or less memory, on Llama 3.1: recompute nothing, the MLPs or all
layers; keep layer inputs and the input embedding in host memory.

Writes benchmarks/reports/memory_<device>_<yyyy-mm>.md, .json and .png. The setting is that of figure 6 of the QLoRA
paper: one row of 512 tokens, rank 64 on all linear layers, all layers checkpointed. It is repeated at 2,048 tokens.
Weights are synthetic: real shapes, random NF4 codes.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from qlora.memory.estimate import estimate
from qlora.recipe import Recipe

MODELS = {"7B": "llama-7b", "13B": "llama-13b", "33B": "llama-33b", "65B": "llama-65b"}
RECIPES = {**MODELS, "Llama 3.1 8B": "llama-3.1-8b", "Llama 3.1 70B": "llama-3.1-70b"}
LENGTHS = (512, 2048)
PAPER_GB = {"7B": 6.9, "13B": 11.3, "33B": 24.7, "65B": 45.0}
"""QLoRA (Dettmers et al. 2023), figure 6, at 512 tokens, GB; from a secondary source, not checked against the paper"""

COMMON = [
    "training.micro_batch_size=1",
    "training.global_batch_size=1",
    "data.source=someone/rows",
    "data.held_out=0",
]
METHODS = {
    "full": ["base.quantization=none", "adapter.method=full", "optimizer.name=adamw"],
    "LoRA": ["base.quantization=none", "adapter.rank=64", "adapter.targets=all-linear"],
    "QLoRA": ["adapter.rank=64", "adapter.targets=all-linear"],
}
HOST = ["training.activation_offloading=true", "base.embedding=host"]
WAYS: dict[str, list[str]] = {
    "nothing recomputed": ["training.activation_checkpointing=none"],
    "MLPs recomputed": ["training.activation_checkpointing=mlp"],
    "all layers recomputed": [],
    "and their inputs on the host": ["training.activation_offloading=true"],
    "and the embedding": HOST,
}
LONG = [("Llama 3.1 8B", 16384), ("Llama 3.1 8B", 65536), ("Llama 3.1 70B", 4096)]
"""models and row lengths for the last three ways"""
REPORTS = Path(__file__).parent / "reports"
GIB = 2**30


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--measure", action="store_true", help="also run QLoRA on this GPU")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--out", type=Path, default=REPORTS)
    arguments = parser.parse_args()
    if arguments.measure and not torch.cuda.is_available():
        parser.error("--measure needs a GPU, but torch finds none")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no-gpu"
    name = f"memory_{device.lower().replace(' ', '-')}_{datetime.now(UTC):%Y-%m}"
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    ways: list[dict[str, Any]] = []
    content = {"environment": environment(), "rows": rows, "ways": ways}

    def keep(into: list[dict[str, Any]], *cell: Any) -> None:
        """Add a row and write them all, so that a run that is cut short keeps what it has."""
        into.append(row(*cell))
        whole = arguments.out / f"{name}.json"
        part = whole.with_suffix(".part")
        part.write_text(json.dumps(content, indent=1) + "\n")
        part.replace(whole)

    for model in arguments.models:
        for length in arguments.lengths:
            for method in METHODS:
                keep(rows, model, method, length, arguments.measure)
    cells = [("Llama 3.1 8B", 4096, way) for way in WAYS]
    cells += [(model, length, way) for model, length in LONG for way in list(WAYS)[-3:]]
    for model, length, way in cells:
        keep(ways, model, "QLoRA", length, arguments.measure, way)
    picture(rows, arguments.out / f"{name}.png")
    text = markdown(content, name)
    (arguments.out / f"{name}.md").write_text(text)
    print(text)


def row(
    model: str, method: str, length: int, measure: bool, way: str = "all layers recomputed"
) -> dict[str, Any]:
    """Return one row of a table: bytes by the rule of thumb, by the forecast and as measured."""
    overrides = [*COMMON, *METHODS[method], *WAYS[way], f"data.max_length={length}"]
    memory = estimate(recipe_of(model, overrides)).memory
    return {
        "model": model,
        "method": method,
        "tokens": length,
        "way": way,
        # The rule of thumb does not cover a quantized base; for QLoRA this is its value for LoRA
        "documents_bytes": memory["documents"]["total_bytes"],
        "forecast": {
            key: memory["forecast"][key] for key in ("total_bytes", "parts", "peak", "allocated_bytes")
        },
        "measured": measured(model, overrides) if measure and method == "QLoRA" else None,
    }


def recipe_of(model: str, overrides: list[str]) -> Recipe:
    """Return the shipped recipe with the overrides, without the keys that have no effect for the method."""
    recipe = Recipe.load(RECIPES[model]).to_dict()
    if "adapter.method=full" in overrides:
        recipe["adapter"] = {"method": "full"}
    if "base.quantization=none" in overrides:
        for key in ("double_quant", "block_size"):
            del recipe["base"][key]
    for override in overrides:
        key, value = override.split("=")
        section, name = key.split(".")
        plain = value.lstrip("-").isdigit() or value in ("true", "false")
        recipe[section][name] = json.loads(value) if plain else value
    for key in ("split", "columns"):
        recipe["data"].pop(key, None)
    if recipe["data"]["held_out"] == 0:
        for key in ("eval_every", "samples", "sample_tokens"):
            recipe["training"].pop(key, None)
    return Recipe.from_dict(recipe, RECIPES[model])


def measured(model: str, overrides: list[str], device: str = "cuda") -> dict[str, Any]:
    """Run two steps of QLoRA on full rows in a fresh process; return its memory, or its error."""
    length = int(next(o for o in overrides if "max_length" in o).split("=")[1])
    rows = Path(tempfile.gettempdir()) / f"qlora-memory-rows-{length}.jsonl"
    rows.write_text("".join(json.dumps({"text": "word " * 2 * length}) + "\n" for _ in range(4)))
    settings = [*overrides, "base.init=synthetic", f"training.device={device}"]
    settings = [o for o in settings if not o.startswith("data.source")]
    settings += [f"data.source={rows}", "data.format=completion", "data.too_long=truncate"]
    name = RECIPES.get(model, model)
    command = [sys.executable, "-m", "qlora", "profile", name, *settings, "--steps", "2", "--json"]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        return {"error": (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1]}
    account = json.loads(run.stdout)
    keys = ("total_bytes", "parts", "peak", "allocated_bytes", "reserved_bytes", "driver_bytes")
    return {key: account["measured"][key] for key in keys}


def environment() -> dict[str, str]:
    """Return the date, command, commit, device and versions behind the numbers."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "commit": commit,
        "command": " ".join(["python", "benchmarks/memory.py", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU",
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "bitsandbytes")},
    }


NULL_GPU = [
    "",
    "**Measured on a null GPU** (`benchmarks/null_gpu`): torch's own allocator served every request of a run, but "
    "nothing was computed. A null GPU has no CUDA context. The forecast assumes 0.51 GiB for it, which the column "
    "error leaves out.",
]


def markdown(content: dict[str, Any], name: str) -> str:
    """Return the report as Markdown."""
    lines = [
        "# Memory: full fine-tuning, LoRA and QLoRA",
        "",
        "One row per micro-batch, rank 64 on all linear layers, all layers checkpointed, AdamW with an fp32 master "
        "copy (paged for LoRA and QLoRA). Sizes are in GiB, except the paper's, which are in GB as published.",
        "",
        f"![bars]({name}.png)",
        "",
        "| model | tokens | method | rule of thumb | forecast | of which paged | measured | error | QLoRA paper, GB |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for entry in content["rows"]:
        forecast = entry["forecast"]
        shown, error = measurement_cells(forecast, entry["measured"])
        paper = PAPER_GB[entry["model"]] if (entry["method"], entry["tokens"]) == ("QLoRA", 512) else "–"
        paged = forecast["parts"].get("optimizer_state_paged", 0)
        lines.append(
            f"| {entry['model']} | {entry['tokens']:,} | {entry['method']} | {entry['documents_bytes'] / GIB:.2f} "
            f"| {forecast['total_bytes'] / GIB:.2f} | {paged / GIB:.2f} | {shown} | {error} | {paper} |"
        )
    lines += [
        "",
        "The rule of thumb is 2 bytes per weight, 2 per gradient and 4 for Adam. It does not cover a quantized base, "
        "so the rows for QLoRA repeat its value for LoRA.",
        "",
        "## Options that use more or less memory",
        "",
        "QLoRA as above, in rows of the given number of tokens. A way that begins with *and* adds to the way above it.",
        "",
        "| model | tokens | way | forecast | measured | error |",
        "|---|---:|---|---:|---:|---:|",
        *(
            f"| {entry['model']} | {entry['tokens']:,} | {entry['way']} "
            f"| {entry['forecast']['total_bytes'] / GIB:.2f} "
            f"| {' | '.join(measurement_cells(entry['forecast'], entry['measured']))} |"
            for entry in content["ways"]
        ),
        *(NULL_GPU if content["environment"]["device"] == "null GPU" else []),
        "",
    ]
    lines += [f"- {key}: {value}" for key, value in content["environment"].items()]
    return "\n".join(lines) + "\n"


def measurement_cells(forecast: dict[str, Any], real: dict[str, Any] | None) -> tuple[str, str]:
    """Return two table cells: the measured GiB, and the relative error of the forecast."""
    if real is None:
        return "not measured", "–"
    if "error" in real:
        return real["error"], "–"
    # A null GPU has no CUDA context to measure
    context = 0 if "device_context" in real["parts"] else forecast["parts"]["device_context"]
    error = (forecast["total_bytes"] - context) / real["total_bytes"] - 1
    return f"{real['total_bytes'] / GIB:.2f}", f"{error:+.1%}"


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw bars by model and method for the shortest row length, on a logarithmic scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    length = min(row["tokens"] for row in rows)
    shown = [row for row in rows if row["tokens"] == length]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    measured_on = f"measured on a {device}" + (", without CUDA context" if device == "null GPU" else "")
    figure, axes = pyplot.subplots(figsize=(10, 5.2), layout="constrained")
    colours = {"rule of thumb": "#c3c9cf", "forecast": "#2b5a8c", measured_on: "#a8480f"}
    for place, row in enumerate(shown):
        real = (row["measured"] or {}).get("total_bytes")
        bars = {
            "rule of thumb": row["documents_bytes"],
            "forecast": row["forecast"]["total_bytes"],
            measured_on: real,
        }
        for offset, (name, size) in enumerate(bars.items()):
            if size:
                x = place + 0.27 * (offset - 1)
                axes.bar(x, size / GIB, 0.25, color=colours[name], label=name if place == 2 else None)
                axes.text(x, size / GIB * 1.04, f"{size / GIB:.3g}", ha="center", fontsize=6.3)
    axes.set_yscale("log", base=2)
    axes.set_yticks([4, 8, 16, 24, 48, 80, 160, 320, 640, 1280], [4, 8, 16, 24, 48, 80, 160, 320, 640, 1280])
    axes.set_xticks(range(len(shown)), [f"{row['method']}\n{row['model']}" for row in shown])
    for size in (24, 48, 80):
        axes.axhline(size, color="#68707a", linewidth=0.7, linestyle=":")
    axes.set_ylabel("GiB")
    axes.set_title(
        f"Memory with one row of {length} tokens: rule of thumb, forecast and measurement",
        loc="left", fontsize=11, fontweight="bold",
    )  # fmt: skip
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
