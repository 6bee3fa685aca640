"""Plain text format: all tokens are trained."""

from collections.abc import Mapping

from qlora.formats.format import Completion, Format, Row
from qlora.formats.values import filled
from qlora.formats.weights import COLUMNS, require_trained

MARKS = tuple(name for name in COLUMNS if name != "label")  # the label of a text is its class


def _parse(row: Row, names: Mapping[str, str]) -> Completion:
    others = require_trained({name: row[name] for name in MARKS if name in row})
    return Completion("", filled(row, names["text"], "empty text"), unused=others)


FORMAT = Format("completion", ("text",), _parse, "text", optional=MARKS)
