"""Draw the README's pictures from the committed reports: docs/pictures/know.png and fast.png.

    python benchmarks/pictures.py                      seconds; reads benchmarks/reports/*.json

The third picture is in benchmarks/reports, where benchmarks/kills.py draws it from the runs that it compares.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from qlora.report.pictures import ACCENT, MUTED, SECOND, figure, png

REPORTS = Path(__file__).parent / "reports"
PICTURES = Path(__file__).parents[1] / "docs/pictures"
MEMORY, SPEED = "memory_null-gpu_2026-11.json", "speed_dense_cpu_2026-11.json"
TOKENS = 512
PEER = "#b9c1ca"
GIB, MIB = 2**30, 2**20

# What the benchmark calls a contender -> what a reader calls it. Each trainer's best form, and ours twice
SHOWN = {
    "qlora": "qlora, nothing recomputed",
    "qlora +ckpt": "qlora, all layers recomputed",
    "peft_tuned": "PEFT tuned by hand",
    "peft_compiled +ckpt": "PEFT tuned and compiled",
    "trainer +ckpt": "PEFT in transformers' Trainer",
    "peft_documented +ckpt": "PEFT as documented",
    "trl +ckpt": "TRL's SFTTrainer",
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=PICTURES)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    memory, speed = (json.loads((REPORTS / name).read_text()) for name in (MEMORY, SPEED))
    (out / "know.png").write_bytes(know(memory["rows"]))
    (out / "fast.png").write_bytes(fast(speed["comparison"]["scores"]))


def know(rows: list[dict[str, Any]]) -> bytes:
    """GiB of QLoRA at four sizes: rule of thumb for LoRA, forecast, and what torch's allocator reserved."""
    chosen = [row for row in rows if (row["method"], row["tokens"]) == ("QLoRA", TOKENS)]
    bars = {
        "rule of thumb for LoRA": (PEER, [row["documents_bytes"] for row in chosen]),
        # The measurement has no CUDA context, so the forecast is shown without it
        "forecast of QLoRA": (
            SECOND,
            [row["forecast"]["total_bytes"] - row["forecast"]["parts"]["device_context"] for row in chosen],
        ),
        "measured with torch's allocator": (ACCENT, [row["measured"]["total_bytes"] for row in chosen]),
    }
    with figure(7, 3) as drawing:
        axes = drawing.subplots()
        for number, (label, (colour, sizes)) in enumerate(bars.items()):
            places = [place + 0.27 * (number - 1) for place in range(len(chosen))]
            axes.bar(places, [size / GIB for size in sizes], 0.25, color=colour, label=label)
            for place, size in zip(places, sizes, strict=True):
                axes.annotate(
                    f"{size / GIB:.1f}", (place, size / GIB), (0, 2), textcoords="offset points", ha="center",
                    fontsize=7.5,
                )  # fmt: skip
        axes.set_xticks(range(len(chosen)), [row["model"] for row in chosen])
        axes.set_ylabel("GiB", color=MUTED)
        axes.set_title("Peak memory, one row of 512 tokens, rank 64 on all linear layers", loc="left")
        axes.set_axisbelow(True)
        axes.grid(axis="y")
        axes.legend()
        drawing.tight_layout()
        return png(drawing)


def fast(scores: list[dict[str, Any]]) -> bytes:
    """Tokens a second and peak memory of each contender, on two CPU cores."""
    found = {
        " ".join([s["contender"]["program"], *map("+{}".format, s["contender"]["flags"])]): s for s in scores
    }
    chosen = [(label, found[name]) for name, label in SHOWN.items()][::-1]
    with figure(7, 2.9) as drawing:
        left, right = drawing.subplots(1, 2, sharey=True)
        colours = [ACCENT if label.startswith("qlora") else PEER for label, _ in chosen]
        for axes, title, values in (
            (left, "tokens a second (more is better)", [score["tokens"]["middle"] for _, score in chosen]),
            (
                right,
                "peak memory, MiB (less is better)",
                [_middle(score["memory"]) / MIB for _, score in chosen],
            ),
        ):
            axes.barh([label for label, _ in chosen], values, 0.7, color=colours)
            for place, value in enumerate(values):
                axes.annotate(
                    f"{value:,.0f}",
                    (value, place),
                    (3, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=8,
                )
            axes.set_title(title, loc="left")
            axes.set_xticks([])
            axes.set_xlim(0, 1.15 * max(values))
        drawing.tight_layout()
        return png(drawing)


def _middle(values: list[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
