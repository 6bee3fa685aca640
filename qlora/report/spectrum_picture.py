"""Picture of an adapter's spectra: effective rank by block and kind of layer, and the decay of the singular values."""

import math
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

from qlora.adapter.algebra.module_types import places
from qlora.adapter.algebra.spectrum import MOST, Spectrum
from qlora.errors import SaveError
from qlora.report.pictures import require_format
from qlora.storage.atomic import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WRITTEN_OUT = 16
"""most blocks for which the cells show their numbers"""

MOST_NAMED = 10
"""most kinds in the legend; there are no more colours"""


def draw(layers: Mapping[str, Spectrum], path: Path, title: str) -> None:
    """Write the picture of an adapter's spectra to `path`; replace an older file.

    Args:
        layers: spectrum of each adapted layer, by name.
        path: the file; its suffix is one of FORMATS.
        title: title, written before the medians.

    Raises:
        UsageError: unknown suffix.
        SaveError: the file cannot be written.
    """
    require_format(path)
    from matplotlib.figure import Figure

    kinds: dict[str, dict[int, list[Spectrum]]] = {}
    for name, (kind, block) in places(layers).items():
        kinds.setdefault(kind, {}).setdefault(block, []).append(layers[name])
    figure = Figure(figsize=(11, max(3.6, 1.6 + 0.32 * len(kinds))), layout="constrained")
    ranks, falls = figure.subplots(1, 2, width_ratios=(1.25, 1))
    _heat_map(ranks, kinds, max(layer.rank for layer in layers.values()))
    _falls(falls, kinds)
    figure.suptitle(f"{title}: {headline(layers)}", fontsize=11)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            figure.savefig(file, dpi=100, format=path.suffix[1:].lower())
    except OSError as error:
        raise SaveError(f"{path}: cannot save the picture: {error.strerror or error}") from error


def _heat_map(axes: "Axes", kinds: Mapping[str, Mapping[int, list[Spectrum]]], rank: int) -> None:
    """Draw the effective ranks, kinds down and blocks across. Colours run from 0 to the rank: dark means unused."""
    blocks = sorted({block for row in kinds.values() for block in row})
    values = [
        [mean(x.effective_rank for x in row[block]) if block in row else float("nan") for block in blocks]
        for row in kinds.values()
    ]
    image = axes.imshow(values, cmap="viridis", vmin=0, vmax=rank, aspect="auto")
    axes.set_yticks(range(len(kinds)), kinds)
    step = -(len(blocks) // -WRITTEN_OUT)
    axes.set_xticks(range(0, len(blocks), step), [str(block) for block in blocks[::step]])
    axes.set_xlabel("block")
    axes.set_title(f"effective rank (of {rank})", fontsize=10)
    if len(blocks) <= WRITTEN_OUT:
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                if value == value:
                    colour = "white" if value < 0.6 * rank else "black"
                    axes.text(x, y, f"{value:.1f}", ha="center", va="center", color=colour, fontsize=8)
    figure: Any = axes.figure
    figure.colorbar(image, ax=axes, pad=0.02)


def _falls(axes: "Axes", kinds: Mapping[str, Mapping[int, list[Spectrum]]]) -> None:
    """Draw the energy lost if only i directions are kept: thin for each layer, thick for the median of a kind."""
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    colours = colormaps["tab10"].colors  # type: ignore[attr-defined]
    longest = 1
    for number, (kind, row) in enumerate(kinds.items()):
        colour = colours[number % len(colours)]
        lines = [spectrum.energy_left[:-1] for block in row.values() for spectrum in block if spectrum.norm]
        for line in lines:
            axes.plot(range(len(line)), line, color=colour, lw=0.6, alpha=0.35)
        steps = zip_longest(*lines, fillvalue=0.0)  # no energy is left beyond the rank
        middle = [median(shares) or math.nan for shares in steps]
        axes.plot(range(len(middle)), middle, color=colour, lw=2, label=kind if number < MOST_NAMED else None)
        longest = max(longest, len(middle))
    axes.axhline(1 - MOST, color="black", lw=1, ls="--")
    axes.set_yscale("log")
    axes.set_xlim(0, longest)
    axes.set_ylim(1e-4, 1.1)
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("directions kept")
    axes.set_title(f"energy lost by keeping fewer (dashed: {1 - MOST:.0%})", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower left")


def headline(layers: Mapping[str, Spectrum]) -> str:
    """Return the medians over all layers in one line."""
    spectra = [layer for layer in layers.values() if layer.norm]
    if not spectra:
        return "every update is zero"
    middle = median(layer.effective_rank for layer in spectra)
    most = median(layer.rank_for(MOST) for layer in spectra)
    return f"median effective rank {middle:.1f}, {MOST:.0%} of the energy in {most:g} directions"
