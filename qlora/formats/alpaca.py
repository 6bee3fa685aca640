"""Stanford Alpaca format: an instruction, an optional input, and the output; also `system` and earlier turns."""

from collections.abc import Mapping

from qlora.formats.format import BadRow, Conversation, Format, Message, Row, is_empty
from qlora.formats.turns import OPTIONAL, Messages, assembled
from qlora.formats.values import described, filled, text


def _parse(row: Row, names: Mapping[str, str]) -> Conversation:
    instruction = filled(row, names["instruction"], "empty prompt")
    context = "" if row.get(names["input"]) is None else text(row, names["input"])
    context = context if context.strip() else ""
    output = filled(row, names["output"], "empty answer")
    content = f"{instruction}\n\n{context}" if context else instruction
    question = {"role": "user", "content": content, "instruction": instruction, "input": context}
    return assembled(row, Messages([*_history(row), question, {"role": "assistant", "content": output}]))


def _history(row: Row) -> list[Message]:
    """Return the earlier turns in LLaMA-Factory's `history` column: a list of [question, answer]."""
    if is_empty(row.get("history")):
        return []
    messages: list[Message] = []
    pairs = row["history"] if isinstance(row["history"], list) else [row["history"]]
    for number, pair in enumerate(pairs, 1):
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(x, str) for x in pair)):
            raise BadRow(
                "wrong type", f"'history', entry {number}: must be [question, answer], not {described(pair)}"
            )
        turn = {"question": pair[0], "answer": pair[1]}
        messages += [
            {"role": "user", "content": filled(turn, "question", "empty prompt")},
            {"role": "assistant", "content": filled(turn, "answer", "empty answer")},
        ]
    return messages


FORMAT = Format(
    "alpaca", ("instruction", "input", "output"), _parse, "instruction", template="alpaca",
    optional=("history", *OPTIONAL),
)  # fmt: skip
