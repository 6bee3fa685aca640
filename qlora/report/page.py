"""report.html: a run on one page, from its folder alone. It asks for nothing else, and runs no script but its own."""

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora.errors import ModelError
from qlora.recipe import Recipe
from qlora.report import history
from qlora.report.curves import BOTTOM, LEFT, RIGHT, TOP, charts
from qlora.report.headlines import headlines
from qlora.report.memory_comparison import COLUMNS, Comparison
from qlora.report.samples import prompts
from qlora.storage import atomic

HERE = Path(__file__).parent


def write_page(run: Path) -> Path:
    """Write `<run>/report.html` from recipe.yaml, metrics.jsonl, result.json and memory.json, as far as they are there.

    The run need not be finished. Returns the page's path.

    Raises:
        ModelError: there is no run in the folder, or a file of it cannot be read.
        SaveError: the page cannot be written.

    >>> write_page(Path("runs/quickstart"))
    PosixPath('runs/quickstart/report.html')
    """
    page = run / "report.html"
    # Text from data may hold half a surrogate pair, which no file can: shown as a question mark.
    atomic.write(page, render(run).encode(errors="replace"))
    return page


def render(run: Path) -> str:
    """The page as text; see `write_page`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    if not ((run / "recipe.yaml").is_file() and (run / "run.json").is_file()):
        raise ModelError(f"{run}: no run here. Give the folder of a run, as in runs/quickstart")
    recipe = Recipe.recorded(run / "recipe.yaml")
    records, result = history.read(run / "metrics.jsonl"), _json(run / "result.json")
    memory = _json(run / "memory.json")
    script = (HERE / "page.js").read_text()
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2").render(
        name=run.resolve().name,
        lead=_lead(recipe),
        recipe_text=(run / "recipe.yaml").read_text(),
        finished=result is not None,
        headlines=headlines(recipe, records, result, memory),
        charts=charts(records),
        plot=f"inset: {1 - TOP:.1%} {1 - RIGHT:.1%} {BOTTOM:.1%} {LEFT:.1%}",
        prompts=prompts(records.samples),
        memory=None if memory is None else _memory(memory),
        style=Markup((HERE / "page.css").read_text()),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _lead(recipe: Recipe) -> str:
    """The recipe in a line: what was trained, how, and on what."""
    base, adapter, data = recipe.base, recipe.adapter, recipe.data
    return (
        f"{base.model}{' in NF4' if base.quantization == 'nf4' else ''} · {adapter.summary} · {data.source}"
    )


def _memory(memory: Mapping[str, Any]) -> dict[str, Any]:
    """What the template shows of memory.json."""
    from markupsafe import Markup

    from qlora.report import memory_picture

    comparison = Comparison(memory)
    return {
        "comparison": comparison,
        "columns": [*COLUMNS, "error"] if comparison.measured else COLUMNS[:-1],
        "remarks": memory["documents"]["remarks"],
        "bars": Markup(memory_picture.bars_svg(memory)),  # from matplotlib, which escapes what it is given
        "timeline": Markup(memory_picture.timeline_svg(memory)),
    }


def _json(file: Path) -> dict[str, Any] | None:
    """The object in a file; None where there is no file."""
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_bytes())
    except ValueError as error:
        raise ModelError(f"{file}: cannot be read: {error}. Remove it, or put it back from a copy") from error
