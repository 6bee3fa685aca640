"""Shared look of the report's pictures: colours, type and grid; figures without a display; SVG for a page."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# A page replaces these colours by its own, so that the pictures follow its light and dark modes. All other colours
# of a picture must differ from these. Blue and orange stay distinct for colour-blind eyes.
INK, MUTED, PAPER, LINE, ACCENT, SECOND = "#1f2329", "#68707a", "#fffffe", "#e1e5ea", "#2b5a8d", "#b8500f"
VARIABLES = {
    INK: "--ink", MUTED: "--muted", PAPER: "--paper", LINE: "--line", ACCENT: "--accent", SECOND: "--second",
}  # fmt: skip

# No frame, no tick marks, and plain text: `$` in a device's name must not start a formula.
STYLE: dict[Any, Any] = {
    "text.parse_math": False,
    "text.color": INK,
    "font.size": 8,
    "font.sans-serif": ["DejaVu Sans", "Verdana"],  # Verdana is nearly as wide, for readers without DejaVu
    "axes.facecolor": "none",
    **{f"axes.spines.{side}": False for side in ("left", "right", "top", "bottom")},
    **{f"{axis}tick.major.size": 0 for axis in "xy"},
    **{f"{axis}tick.labelsize": 8.5 for axis in "xy"},
    **{f"{axis}tick.labelcolor": MUTED for axis in "xy"},
    "axes.autolimit_mode": "round_numbers",  # a scale ends at a tick
    "axes.ymargin": 0,
    "axes.formatter.useoffset": False,
    "grid.color": LINE,
    "legend.frameon": False,
    "legend.labelcolor": MUTED,
    "svg.fonttype": "none",
    "svg.hashsalt": "qlora",
}  # fmt: skip


FORMATS = (".png", ".svg", ".pdf")


def require_format(path: Path) -> None:
    """Raise UsageError unless the suffix of `path` is one of FORMATS."""
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"{path}: a picture's name ends in {', '.join(FORMATS)}; choose one of these")


@contextmanager
def figure(width: float, height: float) -> Iterator["Figure"]:
    """Yield a figure of this size in inches that needs no display. Draw and save it inside the context, under STYLE."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        yield Figure((width, height), facecolor=PAPER)


def png(figure: "Figure") -> bytes:
    """Return the figure as a PNG file."""
    return saved(figure, "png", dpi=150)


def svg_element(figure: "Figure", name: str) -> str:
    """Return the figure as an element for a page. Its ids begin with `name`; its colours are the page's variables."""
    text = saved(figure, "svg").decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    viewbox = re.search(r'viewBox="[^"]*"', text)
    assert viewbox is not None
    text = re.sub(r"<svg[^>]*>", f'<svg {viewbox[0]} style="stroke-linejoin: round">', text, count=1)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # only paths are referenced
    text = text.replace("xlink:href", "href")
    text = re.sub(r' id="|href="#|url\(#', rf"\g<0>{name}-", text)
    text = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable}, {colour})")
    return text


def saved(figure: "Figure", kind: str, **how: Any) -> bytes:
    """Return the figure as a file of one of FORMATS, written without its dot."""
    stream = io.BytesIO()
    figure.savefig(stream, format=kind, **how)
    return stream.getvalue()
