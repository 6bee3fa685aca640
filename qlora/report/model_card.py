"""README.md of a run for the hub: base, data, curves, memory, recipe and licence, without anything private.

Text of the run is cleaned first: a path of this machine becomes its last name, and rows, answers, commands and trackers
are left out.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qlora.errors import ModelError
from qlora.recipe import Recipe
from qlora.recipe.source_names import is_local
from qlora.report import history, pictures
from qlora.report.curves import charts
from qlora.report.facts import RunFacts
from qlora.report.headlines import headlines
from qlora.storage.json_files import without_checksum

_PATH = re.compile(r"""(?<![\w/.:)\]<\[|])(?:file:/)?[~.]{0,2}/(?:[^\s,;'"`/]+/)+([^\s,;'"`/]+)""")

TEMPLATE_FILES = (".jinja", ".jinja2", ".j2")


@dataclass(frozen=True)
class Clean:
    """Removes the paths of this machine from texts of a run.

    >>> Clean.of(recipe)("data /home/me/rows.jsonl: 3 rows")
    'data rows.jsonl: 3 rows'
    """

    known: Mapping[str, str]
    """paths that the recipe names, also relative ones, with their last names"""

    @classmethod
    def of(cls, recipe: Recipe, base: str | None = None) -> "Clean":
        """Return the replacements for a recipe; `base` is the base's id on the hub, if the run used a local folder."""
        data = recipe.data
        sources = [data.held_out, *(part.source_name for part in data.parts)]
        templates = [
            part.template for part in data.parts if Path(part.template or "").suffix in TEMPLATE_FILES
        ]
        start = recipe.adapter.start_from
        local = [name for name in sources if isinstance(name, str) and is_local(name)]
        local += [name for name in templates if name] + ([start] if start and is_local_base(start) else [])
        known = {path: Path(path).name or "rows" for path in local if not path.startswith("bundled/")}
        if is_local_base(recipe.base.model):
            known[recipe.base.model] = base or Path(recipe.base.model).name
        return cls(dict(sorted(known.items(), key=lambda pair: -len(pair[0]))))

    def __call__(self, text: str) -> str:
        """Return a text without paths of this machine."""
        for path, name in self.known.items():
            text = text.replace(path, name)
        return _PATH.sub(r"\1", text)


def is_local_base(name: str) -> bool:
    """Return True if a base is a folder of this machine, not a hub id or a model of the package."""
    return not name.startswith("bundled/") and (
        name.startswith(("/", "~", ".")) or name.count("/") > 1 or Path(name).exists()
    )


def shared_recipe(recipe: Recipe, clean: Clean) -> str:
    """Return a run's recipe as YAML, without its trackers and the paths of this machine."""
    lines, inside = [], False
    for line in recipe.to_yaml().splitlines():
        if not line.startswith(" "):
            inside = line.startswith("tracking:")
        if not inside:
            lines.append(clean(line))
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class CardSettings:
    """Choices of the user, and what the folder holds."""

    name: str
    merged: bool
    """True for a whole model, False for an adapter"""
    licence: str | None = None
    """id of a licence, as the hub knows it"""
    base: str | None = None
    """the base's id on the hub, if the run used a local folder"""
    repo: str | None = None


def write_card(run: Path | None, recipe: Recipe, folder: Path, settings: CardSettings) -> None:
    """Write README.md, recipe.yaml, curves.png and memory.png into `folder`.

    Args:
        run: folder of the run; None if only its adapter is left, which has no curves.
        recipe: the recipe of the training.
        folder: folder that is uploaded.
        settings: choices of the user.

    Raises:
        ModelError: a file of the run cannot be read.
    """
    settings = replace(settings, merged=settings.merged or not recipe.adapter.facts.frozen_base)
    clean = Clean.of(recipe, settings.base)
    result = _object(run, "result.json")
    memory = _object(run, "memory.json")
    records = history.read(run / "metrics.jsonl") if run is not None else history.History([], [], [])
    parts = [_metadata(recipe, settings), f"# {settings.name}", _lead(recipe, settings, clean)]
    try:
        if result is not None:
            figures = headlines(recipe, records, result, memory)
            parts += [
                _table(
                    [(one.label, f"{one.value} ({one.note})" if one.note else one.value) for one in figures]
                )
            ]
        parts += [_use(recipe, settings, clean)]
        if facts := (result or {}).get("facts") or _object(run, "facts.json"):
            parts += ["## Training", _table(_rows(facts, clean))]
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ModelError(
            f"{run}: a value in result.json, facts.json or memory.json is missing or wrong: {error!r}. Restore the file"
        ) from error
    if records.steps:
        (folder / "curves.png").write_bytes(_curves(records))
        parts += ["![Loss, learning rate, gradient norm and speed by step](curves.png)"]
    if run is not None and memory is not None and (run / "memory.png").is_file():
        (folder / "memory.png").write_bytes((run / "memory.png").read_bytes())
        parts += ["## Memory", "![Memory by part: rule of thumb, forecast and measurement](memory.png)"]
    shared = shared_recipe(recipe, clean)
    # with it, qlora reads the folder as a result
    (folder / "recipe.yaml").write_text(shared, encoding="utf-8")
    parts += ["## Recipe", f"```yaml\n{shared}```", "## Licence", _licence(settings)]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _metadata(recipe: Recipe, settings: CardSettings) -> str:
    """Return the YAML that the hub reads."""
    lines = ["---"]
    name = settings.base or recipe.base.model
    if not is_local_base(name) and not name.startswith("bundled/"):
        lines += [
            f"base_model: {name}",
            f"base_model_relation: {'finetune' if settings.merged else 'adapter'}",
        ]
    lines += [
        f"library_name: {'transformers' if settings.merged else 'peft'}",
        "pipeline_tag: text-generation",
    ]
    if settings.licence is not None:
        lines += [f"license: {settings.licence}"]
    sources = [part.source_name.partition(":")[0] for part in recipe.data.parts]
    if ids := [
        source for source in dict.fromkeys(sources) if not is_local(source) and not Path(source).exists()
    ]:
        lines += ["datasets:", *(f"- {source}" for source in ids)]
    return "\n".join([*lines, "tags:", *(f"- {tag}" for tag in ("qlora", recipe.adapter.method)), "---"])


def _lead(recipe: Recipe, settings: CardSettings, clean: Clean) -> str:
    base = clean(recipe.base.model)
    link = (
        base if base.startswith("bundled/") or "/" not in base else f"[{base}](https://huggingface.co/{base})"
    )
    start = recipe.adapter.start_from
    adapter = recipe.adapter.model_copy(update={"start_from": start and clean(start)})
    what = "All weights" if recipe.adapter.method == "full" else f"An adapter ({adapter.summary})"
    merged = ", merged into the weights" if settings.merged and recipe.adapter.method != "full" else ""
    return f"{what} of {link}{merged}, trained with qlora on {clean(recipe.data.names)}."


def _use(recipe: Recipe, settings: CardSettings, clean: Clean) -> str:
    """Return how to load the model: with transformers and vLLM, and for an adapter with PEFT."""
    own, base = settings.repo or settings.name, clean(recipe.base.model)
    load = f'model = AutoModelForCausalLM.from_pretrained("{own if settings.merged else base}")'
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", "", load]
    if not settings.merged:
        lines = ["from peft import PeftModel", *lines, f'model = PeftModel.from_pretrained(model, "{own}")']
    lines += [f'tokenizer = AutoTokenizer.from_pretrained("{own}")  # with the chat template of the training']
    python = "\n".join(lines)
    serve = (
        f"vllm serve {own}"
        if settings.merged
        else f"vllm serve {base} --enable-lora --lora-modules tuned={own}"
    )
    return f"## Use\n\n```python\n{python}\n```\n\n```sh\n{serve}\n```"


def _rows(facts: Mapping[str, Any], clean: Clean) -> list[tuple[str, str]]:
    """Return the facts about the run without remarks, which can quote rows, and without its command."""
    known = RunFacts.from_json(facts)
    known = replace(known, data=replace(known.data, remarks=[]), notes=[])
    left_out = {"output", "command", "start"}
    rows, label = [], ""
    for own, text in known.rows():
        label = own or label
        if label not in left_out:
            rows.append((own, clean(text)))
    return rows


def _table(rows: list[tuple[str, str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows]
    return "\n".join(["| | |", "|---|---|", *lines])


def _curves(records: history.History) -> bytes:
    """Draw the curves of the run as one picture."""
    shown = charts(records)
    with pictures.figure(9.2, 5.6) as figure:
        axes = figure.subplots(2, 2).flatten()
        for place, chart in zip(axes, shown, strict=False):
            for series in chart.series:
                place.plot(*zip(*series.points, strict=True), label=series.name, color=pictures.ACCENT)
                if series.mark == "dots":
                    place.lines[-1].set(color=pictures.SECOND, marker="o", markersize=4)
                elif series.mark == "faint":
                    place.lines[-1].set(linewidth=0.6, alpha=0.45)
            place.set_title(f"{chart.title}, {chart.unit}" if chart.unit else chart.title, loc="left")
            place.set_xlim(0, max(chart.last_step, 1))
            place.grid(axis="y")
            if len(chart.series) > 1:
                place.legend()
        figure.tight_layout()
        return pictures.png(figure)


def _licence(settings: CardSettings) -> str:
    if settings.licence is not None:
        return f"{settings.licence}. The licence of the base applies to what is made from it."
    return "None was given. The licence of the base applies to what is made from it; see its page."


def _object(run: Path | None, name: str) -> dict[str, Any] | None:
    """Return the object in a file of the run; None if there is none."""
    if run is None or not (run / name).is_file():
        return None
    try:
        return without_checksum(json.loads((run / name).read_bytes()))
    except (ValueError, RecursionError) as error:
        raise ModelError(
            f"{run / name}: cannot be read: {error}. Remove the file, or restore it from a copy"
        ) from error
