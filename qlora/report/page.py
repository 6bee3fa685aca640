"""report.html: a run on one page, made from its folder. It loads nothing and runs no script but its own."""

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora.errors import ModelError
from qlora.recipe import Recipe
from qlora.report import history
from qlora.report.curves import BOTTOM, LEFT, RIGHT, TOP, charts
from qlora.report.facts import Row, RunFacts
from qlora.report.headlines import headlines
from qlora.report.memory_comparison import COLUMNS, RULE_OF_THUMB, Comparison
from qlora.report.samples import prompts
from qlora.storage import atomic
from qlora.storage.json_files import without_checksum

HERE = Path(__file__).parent


def write_page(run: Path) -> Path:
    """Write `<run>/report.html` from those of recipe.yaml, metrics.jsonl, result.json, facts.json and memory.json that
    exist.

    The run can be unfinished.

    Returns:
        Path of the page.

    Raises:
        ModelError: the folder has no run, or a file of the run cannot be read.
        SaveError: the page cannot be written.

    >>> write_page(Path("runs/quickstart"))
    PosixPath('runs/quickstart/report.html')
    """
    page = run / "report.html"
    # Text from data can contain half a surrogate pair, which UTF-8 cannot encode: write a question mark.
    atomic.write(page, render(run).encode(errors="replace"))
    return page


def render(run: Path) -> str:
    """Return the page as text; see `write_page`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    if not ((run / "recipe.yaml").is_file() and (run / "run.json").is_file()):
        raise ModelError(f"{run}: no run here. Pass the folder of a run, for example runs/quickstart")
    recipe = Recipe.recorded(run / "recipe.yaml")
    records, result = history.read(run / "metrics.jsonl"), _json(run / "result.json")
    memory = _json(run / "memory.json")
    with _damage_named(run / "result.json", run / "memory.json"):
        figures = headlines(recipe, records, result, memory)
    with _damage_named(run / "memory.json"):
        memory_shown = None if memory is None else _memory(memory)
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
        headlines=figures,
        charts=charts(records),
        plot=f"inset: {1 - TOP:.1%} {1 - RIGHT:.1%} {BOTTOM:.1%} {LEFT:.1%}",
        prompts=prompts(records.samples),
        facts=_facts(run, result),
        memory=memory_shown,
        style=Markup((HERE / "page.css").read_text()),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _lead(recipe: Recipe) -> str:
    """Return the base, the adapter and the data of the recipe in one line."""
    base, adapter, data = recipe.base, recipe.adapter, recipe.data
    return f"{base.model}{' in NF4' if base.quantization == 'nf4' else ''} · {adapter.summary} · {data.names}"


def _facts(run: Path, result: Mapping[str, Any] | None) -> list[Row]:
    """Return the rows of the facts that are known before the first step; none for a run of an earlier version."""
    file, facts = run / "result.json", (result or {}).get("facts")
    if not facts:
        file = run / "facts.json"
        facts = _json(file)
    if facts is None:
        return []
    with _damage_named(file):
        return RunFacts.from_json(facts).rows()


def _memory(memory: Mapping[str, Any]) -> dict[str, Any]:
    """Return the template's variables for memory.json."""
    from markupsafe import Markup

    from qlora.report import memory_picture

    comparison = Comparison(memory)
    return {
        "comparison": comparison,
        "columns": [*COLUMNS, "error"] if comparison.measured else COLUMNS[:-1],
        "footnote": RULE_OF_THUMB,
        "remarks": memory["documents"]["remarks"],
        "legend": memory_picture.legend(memory),
        "bars": Markup(memory_picture.bars_svg(memory)),  # matplotlib escapes text
        "timeline": Markup(memory_picture.timeline_svg(memory)),
    }


@contextmanager
def _damage_named(*files: Path) -> Iterator[None]:
    """Raise ModelError with the names of the files that exist if a value of theirs is missing or of a wrong type."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        names = " or ".join(str(file) for file in files if file.is_file())
        raise ModelError(
            f"{names}: a value is missing or wrong: {error}. Remove the file or restore it from a copy"
        ) from error


def _json(file: Path) -> dict[str, Any] | None:
    """Return the object in a file; None if there is no file."""
    if not file.is_file():
        return None
    try:
        return without_checksum(json.loads(file.read_bytes()))
    except RecursionError:
        problem = "nested too deep"
    except ValueError as error:
        problem = str(error)
    raise ModelError(f"{file}: cannot be read: {problem}. Remove the file or restore it from a copy")
