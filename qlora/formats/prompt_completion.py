"""Prompt-completion format: both texts are used unchanged."""

from collections.abc import Mapping

from qlora.formats.format import Completion, Format, Row
from qlora.formats.values import filled


def _parse(row: Row, names: Mapping[str, str]) -> Completion:
    prompt = filled(row, names["prompt"], "empty prompt")
    return Completion(prompt, filled(row, names["completion"], "empty answer"))


FORMAT = Format("prompt-completion", ("prompt", "completion"), _parse, "pair")
