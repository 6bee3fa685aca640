"""Compare forecast and driver for three runs: 7B as in the QLoRA paper, and two forms of Llama 3.1 8B."""

from typing import Any

from benchmarks.gpu.lines import arguments, lines
from benchmarks.memory import COMMON, METHODS, measured, measurement_cells, row

RUNS = (
    ("7B", 512, "all layers recomputed"),
    ("Llama 3.1 8B", 4096, "nothing recomputed"),
    ("Llama 3.1 8B", 16384, "and the embedding"),
)


def main() -> None:
    """Run the command line."""
    options, write = arguments(__doc__), lines()
    for model, length, way in RUNS[:1] if options.tiny else RUNS:
        write(small(options.device) if options.tiny else compared(model, length, way))


def compared(model: str, length: int, way: str) -> dict[str, Any]:
    """Return one line: the forecast and the measurement of a run, and the relative error; or the run's error."""
    found = row(model, "QLoRA", length, True, way)
    real = found["measured"]
    line = {key: found[key] for key in ("model", "tokens", "way", "forecast", "measured")}
    if "error" in real:
        return line | {"error": real["error"]}
    return line | {"off": measurement_cells(found["forecast"], real)[1]}


def small(device: str) -> dict[str, Any]:
    """Return the line of a small run, to test this program."""
    real = measured("quickstart", [*COMMON, *METHODS["QLoRA"], "data.max_length=64"], device)
    return {"model": "quickstart", "tokens": 64, "measured": real} | (
        {"error": real["error"]} if "error" in real else {}
    )


if __name__ == "__main__":
    main()
