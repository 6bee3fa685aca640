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
UNTRAINED_ENDS = "untrained ends"
UNTRAINED_BY_BLOCKS = "answers trained in part"
ZERO_WEIGHT = "answers without weight"
AFTER_LAST_ANSWER = "messages after the last answer"
OPEN_THOUGHTS = "answers within a thought"
UNWRITTEN = "unwritten"
UNUSED = "unused"
MOVED_SYSTEM = "moved system messages"
SPELLED_CONTROLS = "spelled controls"
PARSED_CONTROLS = "parsed controls"
SPLIT_TEXTS = "split texts"

_SENTENCES = {
    UNKNOWN_MARKERS: (
        "the template writes {first}, but the tokenizer has no such token: it becomes ordinary pieces, which the model "
        "may never have seen as a marker and which any text can imitate. Set data.template to plain or alpaca, or use "
        "a base whose tokenizer has this token"
    ),
    NOT_TRAINED: "{count:,} rows are left out because they are marked as not to be trained ({details})",
    UNTRAINED_ANSWERS: (
        "{count:,} answers are not trained: in later turns, the template writes them or the messages before them "
        "otherwise than in generation. data.examples=answer trains each answer after its own prompt"
    ),
    UNTRAINED_ENDS: (
        "{count:,} answers are trained without their end, because the template ends them otherwise than a last "
        "answer. data.examples=answer trains each answer with its end"
    ),
    UNTRAINED_BY_BLOCKS: (
        "{count:,} answers are trained in part or not at all, because the template's {{% generation %}} blocks leave "
        "the rest out"
    ),
    ZERO_WEIGHT: "{count:,} answers are context only, because their rows say so",
    AFTER_LAST_ANSWER: "{count:,} messages after the last trained answer of their rows are not used",
    OPEN_THOUGHTS: (
        "{count:,} answers begin within a thought: the generation prompt opens one, and the rows have no reasoning. If "
        "the template has a switch, set data.template_options, for example to {{enable_thinking: false}}"
    ),
    UNWRITTEN: "the template drops or changes a part of some rows: {details}",
    UNUSED: "not used, with the number of rows: {details}",
    MOVED_SYSTEM: "{count:,} system messages are put before the first question (data.system_as: user)",
    SPELLED_CONTROLS: (
        '{count:,} rows contain the text of a control token, such as "{first}"; it is tokenized as ordinary text. If '
        "these rows were rendered with a template, set data.control_tokens=parse"
    ),
    PARSED_CONTROLS: (
        '{count:,} rows contain control tokens such as "{first}", which take effect (data.control_tokens: parse)'
    ),
    SPLIT_TEXTS: "{count:,} texts are longer than data.max_length and are split into several rows",
}


def remarks(counts: "Counts") -> list[str]:
    """Return one sentence for each kind of content that is left out, not trained or changed. Empty if there is none."""
    lines = []
    if counts.held_out_seen:
        lines.append(f"{counts.held_out_seen:,} held-out rows are identical to a training row")
    for name, sentence in _SENTENCES.items():
        found = {
            tally.removeprefix(name).removeprefix(": "): count
            for tally, count in counts.tallies.items()
            if tally.partition(": ")[0] == name
        }
        if found:
            details = listed([f"{detail} ({count:,})" for detail, count in found.items()])
            lines.append(sentence.format(count=sum(found.values()), first=next(iter(found)), details=details))
    return lines
