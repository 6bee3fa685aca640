"""Measures speed and memory over sequence length, rank and model size, changing one of them at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from benchmarks.speed.contenders import Contender
from benchmarks.speed.prepare import Setting
from benchmarks.speed.presets import PRESETS, Preset, llama
from benchmarks.speed.rounds import Comparison, Runner

LENGTHS = (256, 512, 1024, 2048, 4096)
RANKS = (4, 16, 64, 256)
CPU_WIDTHS = (256, 512, 768, 1024)
GPU_SIZES = ("llama-3.2-1b", "llama-3.1-8b", "llama-13b", "llama-33b")


@dataclass(frozen=True)
class Point:
    """One measurement: the changed axis, its value, and the resulting setting."""

    axis: str
    value: str
    setting: Setting


def points(setting: Setting, device: str) -> Iterator[Point]:
    """Yield all points around `setting`, on dense tokens; the tokens per step stay the same if possible."""
    preset = setting.preset
    tokens = preset.sequences * preset.length
    for length in LENGTHS:
        shaped = preset.change(length=length, sequences=max(1, tokens // length))
        yield Point("length", str(length), replace(setting, preset=shaped))
    for rank in RANKS:
        yield Point("rank", str(rank), replace(setting, rank=rank, alpha=float(rank)))
    for size in sizes(preset, device):
        yield Point("model", size.name, replace(setting, preset=size))


def sizes(preset: Preset, device: str) -> list[Preset]:
    """Return models of growing size, with the tokens of `preset`."""
    if device == "cuda":
        return [PRESETS[name].change(sequences=preset.sequences, length=preset.length) for name in GPU_SIZES]
    config = preset.config
    return [
        preset.change(
            name=f"{width}x{config['num_hidden_layers']}",
            config=llama(
                width, config["num_hidden_layers"], width * 11 // 4, config["vocab_size"], width // 64
            ),
        )
        for width in CPU_WIDTHS
    ]


def measure(
    runner: Runner, setting: Setting, device: str, contenders: Sequence[Contender]
) -> list[tuple[Point, Comparison]]:
    """Compare the contenders at every point, in one round with one warm-up step."""
    measurements = []
    for point in points(setting, device):
        runner.report(f"{point.axis} {point.value}")
        measurements.append((point, runner.compare(point.setting, contenders, rounds=1, warmup=1)))
    return measurements
