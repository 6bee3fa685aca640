"""Says in plain sentences which parts of the rows are not trained, are changed or do not reach the model.

Parsers and renderers count such parts as tallies: a name from this file, for some with a detail after a colon. Rows
that are left out completely are counted in `Counts` as well.
"""

from typing import TYPE_CHECKING

from qlora.errors import listed

if TYPE_CHECKING:
    from qlora.data.dataset import Counts

UNKNOWN_MARKERS = "unknown markers"
NOT_TRAINED = "rows marked as not to be trained"
UNTRAINED_ANSWERS = "untrained answers"
UNWRITTEN_ANSWERS = "unwritten answers"
OPENING_ANSWERS = "opening answers"
UNTRAINED_ENDS = "untrained ends"
UNTRAINED_BY_BLOCKS = "answers trained in part"
ZERO_WEIGHT = "answers without weight"
AFTER_LAST_ANSWER = "messages after the last answer"
OPEN_THOUGHTS = "answers within a thought"
UNWRITTEN = "unwritten"
UNUSED = "unused"
PLACED = "placed answers"
JOINED = "joined answers"
MOVED_SYSTEM = "moved system messages"
TRIMMED = "trimmed"
MARKERS_IN_TEXT = "markers in text"
SPELLED_CONTROLS = "spelled controls"
PARSED_CONTROLS = "parsed controls"
SPLIT_TEXTS = "split texts"

OF_ROWS = {
    UNKNOWN_MARKERS, UNWRITTEN, TRIMMED, MOVED_SYSTEM, MARKERS_IN_TEXT, SPELLED_CONTROLS, PARSED_CONTROLS,
}  # fmt: skip
"""tallies of rows, which count a row once, however many examples it gives"""

_SENTENCES = {
    UNKNOWN_MARKERS: (
        "the template writes {first}, but the tokenizer has no such token: it becomes ordinary pieces, which the model "
        "may never have seen as a marker and which any text can imitate. Make it a token and train it with "
        "adapter.train_tokens=new, set data.template to plain or alpaca, or use a base whose tokenizer has this token"
    ),
    NOT_TRAINED: "left out: {rows} marked as not to be trained, {details}",
    UNTRAINED_ANSWERS: (
        "not trained: {answers} that the template writes differently in a longer conversation than in generation; "
        "data.examples=answer trains each answer after its own prompt"
    ),
    UNWRITTEN_ANSWERS: (
        "not trained: {answers} that the template refuses or does not write completely, such as tool calls; choose a "
        "template that writes them"
    ),
    OPENING_ANSWERS: "not trained: {answers} at the start of a conversation, which follow no prompt",
    UNTRAINED_ENDS: (
        "trained without the end: {answers} before another question, where the template ends an answer differently; "
        "data.examples=answer trains each answer with its end"
    ),
    UNTRAINED_BY_BLOCKS: (
        "trained in part or not at all: {answers}, because the template's {{% generation %}} blocks leave the rest out"
    ),
    ZERO_WEIGHT: "context only: {answers}, because the rows say so",
    AFTER_LAST_ANSWER: "not used: {messages} after the last trained answer",
    PLACED: (
        "put behind the generation prompt: {answers}, because the template writes answers of a conversation elsewhere "
        "or differently"
    ),
    JOINED: (
        "begin within a token of their prompt, which generation cannot write: {answers}; move white space from the end "
        "of the prompt to the start of the answer, or set data.examples=answer for conversations"
    ),
    OPEN_THOUGHTS: (
        "trained within a thought: {answers}, because the generation prompt opens a thought and the rows have no "
        "reasoning; if the template has a switch, set data.template_options, for example to {{enable_thinking: false}}"
    ),
    UNWRITTEN: "dropped or changed by the template, with the number of rows: {details}",
    UNUSED: "not used, with the number of rows: {details}",
    MOVED_SYSTEM: "put before the first question: the system message of {rows} (data.system_as: user)",
    TRIMMED: "the template removes white space around a text in {rows}",
    MARKERS_IN_TEXT: (
        'tokenized as ordinary text: markers such as "{first}" in {rows}, which are no tokens of the tokenizer; if the '
        "rows were rendered with a template, use a base whose tokenizer has these tokens"
    ),
    SPELLED_CONTROLS: (
        'tokenized as ordinary text: control tokens such as "{first}" in {rows}; if these rows were rendered with a '
        "template, set data.control_tokens=parse"
    ),
    PARSED_CONTROLS: 'tokenized as they are: control tokens such as "{first}" in {rows} (data.control_tokens: parse)',
    SPLIT_TEXTS: "split into several rows: {texts} longer than data.max_length",
}


def remarks(counts: "Counts") -> list[str]:
    """Return one sentence for each kind of content that is left out, not trained or changed. Empty if there is none."""
    lines = []
    if counts.repeated:
        lines.append(
            f"identical to an earlier training row, token for token: {_counted(counts.repeated)['rows']}"
        )
    if counts.held_out_seen:
        lines.append(f"held out, but identical to a training row: {_counted(counts.held_out_seen)['rows']}")
    for name, sentence in _SENTENCES.items():
        found = {
            tally.removeprefix(name).removeprefix(": "): count
            for tally, count in counts.tallies.items()
            if tally.partition(": ")[0] == name
        }
        if found:
            # a key of a message is rarer and matters more than a column, such as an id
            ordered = sorted(found.items(), key=lambda item: item[0].startswith("column "))
            details = listed([f"{detail} ({count:,})" for detail, count in ordered], most=12)
            numbers = _counted(sum(found.values()))
            lines.append(sentence.format(first=next(iter(found)), details=details, **numbers))
    return lines


def _counted(count: int) -> dict[str, str]:
    """Return the count of each noun: `{"rows": "1 row", ...}`."""
    return {
        f"{noun}s": f"{count:,} {noun}{'s' * (count != 1)}" for noun in ("row", "answer", "message", "text")
    }
