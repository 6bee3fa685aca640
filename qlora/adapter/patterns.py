"""Settings for some layers: a regular expression that matches a name or its last parts, as in PEFT's rank_pattern."""

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import TypeVar

from qlora.errors import UsageError

Value = TypeVar("Value")


def fits(key: str, name: str) -> bool:
    """Whether `key` matches a layer's name or its last parts."""
    return _expression(key).match(name) is not None


def pattern_value(patterns: Mapping[str, Value], name: str, default: Value) -> Value:
    """The value of the first pattern that matches `name`, else `default`."""
    return next((value for key, value in patterns.items() if fits(key, name)), default)


def exactly(name: str) -> str:
    """A regular expression that matches this layer alone, for `select` and for PEFT's patterns."""
    return "^" + re.escape(name)


@lru_cache(maxsize=4096)  # a key for each layer of a large model: re's own cache is too small
def _expression(key: str) -> re.Pattern[str]:
    try:
        return re.compile(rf"(.*\.)?({key})$")
    except re.error as error:
        raise UsageError(
            f'rank_pattern or alpha_pattern: "{key}" is no regular expression ({error})'
        ) from error
