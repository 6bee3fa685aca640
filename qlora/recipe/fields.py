"""Finds settings in the JSON schema of recipes; messages describe the allowed values with it."""

from collections.abc import Mapping
from typing import Any

from qlora.recipe.problems import KeyPath

Schema = Mapping[str, Any]


def at(path: KeyPath, schema: Schema) -> Schema:
    """Return the part of the schema for a setting."""
    node = schema
    for part in path:
        node = _child(options(node, schema), part)
    return node


def _child(choices: list[Schema], part: str | int) -> Schema:
    kind = "object" if isinstance(part, str) else "array"
    [collection] = [option for option in choices if option.get("type") == kind]
    child: Schema
    if isinstance(part, str):
        child = (
            collection["properties"][part]
            if "properties" in collection
            else collection["additionalProperties"]
        )
    else:
        child = collection["items"] if "items" in collection else collection["prefixItems"][part]
    return child


def options(node: Schema, schema: Schema) -> list[Schema]:
    """Return the alternatives of a part of the schema, or the part itself, with references resolved."""
    return [resolved(option, schema) for option in node.get("anyOf", [node])]


def resolved(node: Schema, schema: Schema) -> Schema:
    """Return the definition that a part of the schema refers to, or else the part itself."""
    if "$ref" not in node:
        return node
    definition: Schema = schema["$defs"][node["$ref"].removeprefix("#/$defs/")]
    return definition


def names(schema: Schema) -> list[str]:
    """Return the dotted names of all sections and settings."""
    dotted_names: list[str] = []

    def collect(node: Schema, prefix: str) -> None:
        for name, child in resolved(node, schema).get("properties", {}).items():
            dotted_names.append(prefix + name)
            collect(child, f"{prefix}{name}.")

    collect(schema, "")
    return dotted_names
