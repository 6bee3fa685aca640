"""Plain text format: all tokens are trained."""

from collections.abc import Mapping

from qlora.formats.format import Completion, Format, Row
from qlora.formats.values import filled


def _parse(row: Row, names: Mapping[str, str]) -> Completion:
    return Completion("", filled(row, names["text"], "empty text"))


FORMAT = Format("completion", ("text",), _parse, "text")
