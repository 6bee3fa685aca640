"""Messages about settings that do not fit the schema: what is allowed, and what was written.

pydantic finds the errors; the allowed values come from the JSON schema, so that each limit is written only once.
"""

import json
import re
import shlex
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from pydantic_core import ErrorDetails

from qlora.recipe.fields import Schema, at, options, resolved
from qlora.recipe.overrides import COMMAND_LINE
from qlora.recipe.problems import UNUSABLE, Document, KeyPath, Place, Problem, shorten
from qlora.recipe.reading import MAX_PROBLEMS
from qlora.recipe.scalars import scalar
from qlora.recipe.unknown import unknown
from qlora.recipe.versions import Change, change_of

LIMITS = {
    "minimum": "of at least",
    "exclusiveMinimum": "above",
    "maximum": "of at most",
    "exclusiveMaximum": "below",
}
YES = {"on", "yes", "y"}  # booleans in YAML 1.1
NO = {"off", "no", "n"}
IN_WORDS: dict[KeyPath, list[str]] = {
    ("training", "memory"): ["auto", "null", "a size with a unit, such as 12GiB"],
    ("training", "best_by"): ["lowest loss", "lowest NAME", "highest NAME of a metric"],
    ("training", "device"): ["auto", "cpu", "cuda", "the number of a GPU, such as cuda:1"],
}
"""allowed values of settings that the schema describes only as text"""


def explain(errors: Iterable[ErrorDetails], document: Document, schema: Schema) -> list[Problem]:
    """Turn pydantic's errors about a document into problems with places: one per setting, at most `MAX_PROBLEMS`."""
    # an error without a location is a broken rule between settings, which the caller checks itself
    located = [(_path(error, document.value), error) for error in errors if error["loc"]]
    # pydantic reports every alternative of a union: keep only the innermost setting, and each setting once
    outer = {path[:end] for path, _ in located for end in range(len(path))}
    innermost: dict[KeyPath, ErrorDetails] = {}
    for path, error in located:
        if path not in outer:
            innermost.setdefault(path, error)
    usable = [(path, error) for path, error in innermost.items() if error["input"] is not UNUSABLE]
    problems = [
        Problem(place, path, _text(error, path, place, schema, document))
        for path, error in usable[:MAX_PROBLEMS]
        for place in [document.place(path)]
    ]
    if len(usable) > MAX_PROBLEMS:
        problems.append(
            Problem(Place(document.source), (), f"and {len(usable) - MAX_PROBLEMS} more problems")
        )
    return problems


def _path(error: ErrorDetails, value: Any) -> KeyPath:
    """Return the path of the setting: the error's location without the names of a union's alternatives."""
    path: list[str | int] = []
    for part in error["loc"]:
        inside = range(len(value)) if isinstance(value, list) else value if isinstance(value, dict) else ()
        if part in inside:
            path.append(part)
            value = value[part]
    return (*path, error["loc"][-1]) if _lacks_key(error) else tuple(path)


def _lacks_key(error: ErrorDetails) -> bool:
    # a missing list index is not a missing key: the list is too short
    return error["type"] == "missing" and isinstance(error["loc"][-1], str)


def _text(error: ErrorDetails, path: KeyPath, place: Place, schema: Schema, document: Document) -> str:
    if error["type"] == "extra_forbidden":
        change = change_of(path)
        return _moved(change, place, schema, document) if change else unknown(path, schema)
    node = at(path, schema)
    if _lacks_key(error):
        return f"is required: {node['description']}"
    value = error["input"]
    written = place.written or ("nothing" if value is None else shorten(str(value)))
    if "properties" in resolved(node, schema):
        if value is None:
            return "is empty; indent its keys below it, or leave it out"
        return f"is a section, not a value (you wrote {written}); set its keys"
    allowed = IN_WORDS.get(path) or _allowed(node, schema)
    return f"must be {_any_of(allowed)} (you wrote {written}){_hint(value, allowed)}"


def _moved(change: Change, place: Place, schema: Schema, document: Document) -> str:
    """Return the message about a key of an earlier version: the new key and its value."""
    key = f"{change.section}.{change.new}"
    if place.source != COMMAND_LINE and change.new in document.value[change.section]:
        return f"is now {key}, which this recipe also sets; leave the old key out"
    value = change.value(document.value[change.section])
    if value is None:
        return f"is now {key}, which must be {_any_of(_allowed(at((change.section, change.new), schema), schema))}"
    yaml = json.dumps(value).replace('"', "")
    write = shlex.quote(f"{key}={yaml}") if place.source == COMMAND_LINE else f"{change.new}: {yaml}"
    return f"is now {key}; write `{write}`"


def _any_of(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _allowed(node: Schema, schema: Schema) -> list[str]:
    """Describe each value that a part of the schema allows: `an integer of at least 1`, `null`."""
    node = resolved(node, schema)
    if "anyOf" in node:
        return [words for option in options(node, schema) for words in _allowed(option, schema)]
    if "const" in node:
        return [str(node["const"])]
    if "enum" in node:
        return [str(value) for value in node["enum"]]
    match node["type"]:
        case "integer" | "number" as kind:
            limits = [f"{words} {node[limit]:g}" for limit, words in LIMITS.items() if limit in node]
            return [" ".join([f"{'an' if kind == 'integer' else 'a'} {kind}", " and ".join(limits)]).strip()]
        case "boolean":
            return ["true", "false"]
        case "string":
            return ["text"]
        case "array":
            length = {0: "", 1: " of one or more", 2: " of two"}[node.get("minItems", 0)]
            item = node["items"] if "items" in node else node["prefixItems"][0]
            return [f"a list{length}, each item {_any_of(_allowed(item, schema))}"]
        case "object" if "properties" in node:
            return [f"a mapping with the keys {' and '.join(node['properties'])}"]
        case "object":
            return [
                f"a mapping from names to values, each {_any_of(_allowed(node['additionalProperties'], schema))}"
            ]
        case kind:
            return [str(kind)]


def _hint(value: Any, allowed: list[str]) -> str:
    """Return advice for common YAML mistakes: how to write the value that was probably meant."""
    number = any(words.startswith(("an integer", "a number")) for words in allowed)
    if isinstance(value, float) and number:
        return f"; write {int(value)}" if value.is_integer() and abs(value) < 1e15 else ""
    if not isinstance(value, str):
        return "; put it in quotes" if "text" in allowed and isinstance(value, bool | int | float) else ""
    if "true" in allowed and value.lower() in YES | NO:
        return f"; write {'true' if value.lower() in YES else 'false'}"
    if number:
        plain = re.sub(r"^([-+]?)0+(?=[0-9])", r"\1", value.replace("_", ""))
        meant = scalar(plain)
        if isinstance(meant, int | float) and not isinstance(meant, bool):
            return f"; write {plain}" if plain != value else "; leave the quotes out"
    if near := get_close_matches(value, [words for words in allowed if " " not in words], n=1):
        return f"; did you mean {near[0]}?"
    return f"; write [{shorten(value)}]" if re.match("a list.* item text", allowed[-1]) else ""
