"""Regular expressions in the config of someone's adapter: one can be written so that it never ends on a name."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora.errors import ModelError
from qlora.runtime.bounded import SECONDS, Bounded, OutOfBoundsError

FIELDS = (
    "target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern", "modules_to_save",
    "target_parameters",
)  # fmt: skip

_REPEATS = re.compile(r"[*+{]")


def check_expressions(config: Mapping[str, Any], names: Iterable[str], file: Path) -> None:
    """Check that every expression of a config can be matched against these names within seconds.

    Only expressions with a repetition are tried, in a process of their own; usual configs have none.

    Args:
        config: the fields of adapter_config.json.
        names: names of layers.
        file: the config's file, for the message.

    Raises:
        ModelError: the expressions take too long.
    """
    risky = [text for text in _expressions(config) if _REPEATS.search(text)]
    if not risky:
        return
    try:
        Bounded(_match)(risky, list(names))
    except OutOfBoundsError as error:
        raise ModelError(
            f"{file}: matching its regular expressions ({', '.join(risky)[:80]}) with the names of the layers {error}; "
            f"usual ones take far less than {SECONDS:g} s. Write the names of the layers out instead"
        ) from error


def _expressions(config: Mapping[str, Any]) -> Iterator[str]:
    for field in FIELDS:
        value = config.get(field)
        entries = [value] if isinstance(value, str) else value if isinstance(value, list | dict) else ()
        yield from (entry for entry in entries if isinstance(entry, str))


def _match(expressions: Sequence[str], names: Sequence[str]) -> None:
    """Match in each of the ways in which expressions are used here and in PEFT."""
    for text in expressions:
        for form in (text, rf"(.*\.)?({text})$", rf"(?:^|.*?\.){text}\.(?P<index>\d+)\."):
            try:
                pattern = re.compile(form)
            except re.error:
                continue  # reported by the method, with the field's name
            for name in names:
                pattern.fullmatch(name)
                pattern.match(name)
