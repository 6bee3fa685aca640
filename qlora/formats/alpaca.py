"""Stanford Alpaca format: an instruction, an optional input, and the output."""

from collections.abc import Mapping

from qlora.formats.format import Conversation, Format, Row
from qlora.formats.values import filled, text


def _parse(row: Row, names: Mapping[str, str]) -> Conversation:
    instruction = filled(row, names["instruction"], "empty prompt")
    context = "" if row.get(names["input"]) is None else text(row, names["input"])
    context = context if context.strip() else ""
    output = filled(row, names["output"], "empty answer")
    content = f"{instruction}\n\n{context}" if context else instruction
    question = {"role": "user", "content": content, "instruction": instruction, "input": context}
    return Conversation((question, {"role": "assistant", "content": output}))


FORMAT = Format("alpaca", ("instruction", "input", "output"), _parse, "instruction", template="alpaca")
