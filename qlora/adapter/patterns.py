"""Settings of single layers, chosen by regular expressions as in PEFT's rank_pattern."""

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import TypeVar

from qlora.errors import UsageError

Value = TypeVar("Value")


def fits(key: str, name: str) -> bool:
    """Return True if the expression `key` matches a layer's name or the last parts of the name."""
    return _expression(key).match(name) is not None


def pattern_value(patterns: Mapping[str, Value], name: str, default: Value) -> Value:
    """Return the value of the first pattern that matches `name`, or else `default`."""
    return next((value for key, value in patterns.items() if fits(key, name)), default)


def exactly(name: str) -> str:
    """Return a regular expression that matches only this layer, for `select` and for PEFT's patterns."""
    return "^" + re.escape(name)


@lru_cache(maxsize=4096)  # a large model can have a key per layer: re's own cache is too small
def _expression(key: str) -> re.Pattern[str]:
    try:
        return re.compile(rf"(.*\.)?({key})$")
    except re.error as error:
        raise UsageError(
            f'rank_pattern or alpha_pattern: "{key}" is not a valid regular expression ({error})'
        ) from error
