"""Pages of the site that are made from the code when the site is built, so that they cannot differ from it.

The reference of recipes comes from `qlora/recipe/schema.py`, that of commands from typer, that of exit codes from
`qlora/errors.py`. Benchmark reports and the list of changes are files of the repository, shown as they are.
"""

import html
import inspect
import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic import BaseModel
from typer.cli import get_docs_for_click

from qlora import errors
from qlora.cli import app
from qlora.recipe import Recipe

ROOT = Path(__file__).parents[2]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to those of docs/ (an mkdocs hook)."""
    pages = {
        "reference/recipe.md": "\n".join(recipe_reference()),
        "reference/command-line.md": "\n".join(command_reference()),
        "reference/exit-codes.md": "\n".join(exit_codes()),
        "develop/changes.md": (ROOT / "CHANGELOG.md").read_text(),
    }
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    for source, path in shown_as_they_are():
        if files.get_file_from_path(path) is None:
            files.append(File.generated(config, path, abs_src_path=str(source)))
    return files


def shown_as_they_are() -> Iterator[tuple[Path, str]]:
    """Yield the files of the repository that the site shows as they are, each with its place there."""
    for report in sorted((ROOT / "benchmarks/reports").iterdir()):
        yield report, f"benchmarks/reports/{report.name}"
    yield ROOT / "benchmarks/speed/README.md", "benchmarks/speed.md"
    yield ROOT / "benchmarks/speed/LOG.md", "benchmarks/log.md"
    yield ROOT / "benchmarks/null_gpu/README.md", "benchmarks/null-gpu.md"
    yield ROOT / "benchmarks/gpu/README.md", "benchmarks/gpu.md"


def recipe_reference() -> Iterator[str]:
    """Yield the page of every section and key of a recipe: meaning, default, values."""
    yield "# Recipe"
    yield ""
    yield (
        "A recipe is a YAML file that states only what differs from the defaults on this page. An unknown key is an "
        "error. Any key can be changed on the command line, as in `training.max_steps=100`. Papers are cited as LoRA "
        "(Hu et al. 2021, arXiv:2106.09685) and QLoRA (Dettmers et al. 2023, arXiv:2305.14314). "
        "`qlora recipes schema` prints the same as JSON schema, from which editors complete.\n"
    )
    yield from _section(Recipe, "", Recipe.json_schema()["$defs"])


def _section(section: type[BaseModel], prefix: str, definitions: dict[str, Any]) -> Iterator[str]:
    schema = {**definitions, "Recipe": Recipe.json_schema()}[section.__name__]
    inner = []
    for name, field in section.model_fields.items():
        name = field.alias or name
        key, kind = f"{prefix}{name}", field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            inner.append((kind, key, field.description))
            continue
        yield f"\n### {key} {{ #{key.replace('.', '')} }}\n"
        yield f"{html.escape(field.description, quote=False)}\n"
        yield f"*{_default(field)} · Values: {_values(schema['properties'][name], definitions)}*"
    for kind, key, description in inner:
        yield f"\n## {key}\n\n{description}"
        yield from _section(kind, f"{key}.", definitions)


def _default(field: Any) -> str:
    if field.is_required():
        return "Required"
    value = field.get_default(call_default_factory=True)
    return f"Default: `{json.dumps(list(value) if isinstance(value, tuple) else value)}`".replace('"', "")


def _values(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    """Return the values that the JSON schema of a key allows, in words."""
    match schema:
        case {"$ref": reference}:
            keys = definitions[reference.rsplit("/", 1)[1]]["properties"]
            return "a section with " + ", ".join(f"`{key}`" for key in keys)
        case {"anyOf": options}:
            return " or ".join(_values(option, definitions) for option in options)
        case {"enum": values}:
            return ", ".join(f"`{value}`" for value in values)
        case {"const": value}:
            return f"`{value}`"
        case {"type": "array", "prefixItems": items}:
            return f"a list of {len(items)} numbers"
        case {"type": "array", "items": {"$ref": _} as section}:
            return _values(section, definitions).replace("a section", "a list of sections")
        case {"type": "array", "items": items}:
            return f"a list of {_values(items, definitions).removeprefix('a ')}s"
        case {"type": "object", "additionalProperties": values}:
            return f"names, each with {_values(values, definitions)}"
        case {"type": "null"}:
            return "`null`"
        case {"type": "boolean"}:
            return "`true`, `false`"
        case {"type": "string"}:
            return "a text"
    kind = {"integer": "a whole number", "number": "a number"}[schema["type"]]
    bounds = {
        "minimum": "at least",
        "exclusiveMinimum": "above",
        "maximum": "at most",
        "exclusiveMaximum": "below",
    }
    limits = [f"{words} {schema[bound]:g}" for bound, words in bounds.items() if bound in schema]
    return " ".join([kind, " and ".join(limits)]).strip()


def command_reference() -> Iterator[str]:
    """Yield the page of every command with its arguments and options, from typer."""
    yield "# Command line\n"
    yield (
        "`qlora COMMAND --help` prints the same in a terminal. Errors go to standard error in one message; "
        "the [exit codes](exit-codes.md) tell programs what has to change. `qlora --version` prints the version.\n"
    )
    for names, command in _commands(typer.main.get_command(app), ()):
        text = get_docs_for_click(obj=command, ctx=typer.Context(command), name=" ".join(names))
        anchor = "-".join(names)
        text = re.sub(r"\A# `(.+)`", rf"## \1 {{ #{anchor} }}", text)
        examples = re.findall(r"^\[bold\](.+)\[/bold\]$", text, re.M)
        text = re.sub(r"^\[bold\].+\[/bold\]\n?", "", text, flags=re.M)
        text = re.sub(r"^\* `--help`.*\n?", "", text, flags=re.M)
        text = re.sub(r"\*\*Options\*\*:\n*\Z", "", text)
        yield text.strip().replace("**Usage**:", "").replace("\n\n\n", "\n\n") + "\n"
        if examples:
            yield "**Examples**:\n\n```console"
            yield from (f"$ {example}" for example in examples)
            yield "```\n"


def _commands(group: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in group.commands.items():
        names = (*(path or ("qlora",)), name)
        if hasattr(command, "commands"):
            yield from _commands(command, names)
        else:
            yield names, command


def exit_codes() -> Iterator[str]:
    """Yield the page of the exit codes: errors of the package, and signals."""
    yield "# Exit codes\n"
    yield "Every command of `qlora` ends with one of these. The code follows what has to change.\n"
    yield "| code | error in Python | meaning |\n|---:|---|---|"
    yield "| 0 | | done |"
    classes = [
        kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind is not errors.QloraError
    ]
    for kind in sorted(classes, key=lambda kind: (kind.exit_code, kind.__name__)):
        yield f"| {kind.exit_code} | `qlora.errors.{kind.__name__}` | {inspect.getdoc(kind)} |"
    signals = {
        signal.SIGHUP: "hung up: the terminal was closed",
        signal.SIGINT: "interrupted with Ctrl-C",
        signal.SIGTERM: "terminated, as by a cluster's scheduler",
    }
    for number, meaning in signals.items():
        yield f"| {128 + number} | | {meaning}; `qlora train` saves a checkpoint first, `--resume` continues |"
    yield "\nAny other code comes with a traceback and is a bug in qlora."
