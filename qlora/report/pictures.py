"""The look that all pictures of a report share: colours, type and grid; figures without a display; SVG for a page."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# A page replaces these by its own colours, so that the pictures follow light and dark. No other colour may equal one of
# them. Blue and orange are told apart by all eyes.
INK, MUTED, PAPER, LINE, ACCENT, SECOND = "#1f2329", "#68707a", "#fffffe", "#e1e5ea", "#2b5a8d", "#b8500f"
VARIABLES = {
    INK: "--ink", MUTED: "--muted", PAPER: "--paper", LINE: "--line", ACCENT: "--accent", SECOND: "--second",
}  # fmt: skip

# No frame, quiet ticks, and plain text: `$` in a device's name is no formula.
STYLE: dict[Any, Any] = {
    "text.parse_math": False,
    "text.color": INK,
    "font.size": 8,
    "font.sans-serif": ["DejaVu Sans", "Verdana"],  # nearly as wide, where a page has no DejaVu
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


@contextmanager
def figure(width: float, height: float) -> Iterator["Figure"]:
    """A figure in inches that needs no display, to be drawn on and saved while STYLE holds."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        yield Figure((width, height), facecolor=PAPER)


def png(figure: "Figure") -> bytes:
    """The figure as a PNG file."""
    return _saved(figure, "png", dpi=150)


def svg_element(figure: "Figure", name: str) -> str:
    """The figure as an element for a page: its ids begin with `name`, its colours are the page's variables."""
    text = _saved(figure, "svg").decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    viewbox = re.search(r'viewBox="[^"]*"', text)
    assert viewbox is not None
    text = re.sub(r"<svg[^>]*>", f'<svg {viewbox[0]} style="stroke-linejoin: round">', text, count=1)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # only paths are referred to
    text = text.replace("xlink:href", "href")
    text = re.sub(r' id="|href="#|url\(#', rf"\g<0>{name}-", text)
    text = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable}, {colour})")
    return text


def _saved(figure: "Figure", kind: str, **how: Any) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format=kind, **how)
    return stream.getvalue()
