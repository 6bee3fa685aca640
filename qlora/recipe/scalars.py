"""Converts unquoted text in a recipe to null, a boolean, a number or text.

The rules are the core schema of YAML 1.2 (https://yaml.org/spec/1.2.2, section 10.3.2): `1e-4` is a number; `on`, `no`
and `1:30` are text, and so are `1_000` and `010`, which YAML parsers read differently.
"""

import re
from typing import Any

NULL = re.compile(r"|~|null|Null|NULL")
BOOLEAN = re.compile(r"true|True|TRUE|false|False|FALSE")
INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
OTHER_BASE = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
FRACTION = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
LONGEST_INTEGER = 18  # characters: fits 64 bits; int() itself raises beyond 4,300 digits


def scalar(text: str) -> Any:
    """Return the value of an unquoted scalar."""
    if NULL.fullmatch(text):
        return None
    if BOOLEAN.fullmatch(text):
        return text.lower() == "true"
    if INTEGER.fullmatch(text) and len(text) <= LONGEST_INTEGER:
        return int(text)
    if OTHER_BASE.fullmatch(text) and len(text) <= LONGEST_INTEGER:
        return int(text, base=0)
    if FRACTION.fullmatch(text):
        return float(text)
    return float(text.lower().replace(".", "")) if NOT_FINITE.fullmatch(text) else text
