"""Says in plain sentences which parts of the rows are not trained or do not reach the model.

Renderer and parsers count such parts as tallies: a name from this file, and sometimes a detail after a colon. A row
that is left out completely is counted in `Counts` instead.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qlora.data.dataset import Counts

UNTRAINED_ANSWERS = "untrained answers"
SPELLED_CONTROLS = "spelled controls"
SPLIT_TEXTS = "split texts"

_SENTENCES = {
    UNTRAINED_ANSWERS: (
        "{count:,} answers are not trained: the template renders the messages before them differently in later turns"
    ),
    SPELLED_CONTROLS: (
        '{count:,} rows contain the text of a control token, such as "</s>"; it is tokenized as ordinary text'
    ),
    SPLIT_TEXTS: "{count:,} texts are longer than data.max_length and were split into several rows",
}


def remarks(counts: "Counts") -> list[str]:
    """Return one sentence for each kind of content that is left out, not trained or changed. Empty if there is none."""
    lines = []
    if counts.held_out_seen:
        lines.append(f"{counts.held_out_seen:,} held-out rows are identical to a training row")
    for tally, count in counts.tallies.items():
        name, _, detail = tally.partition(": ")
        lines.append(_SENTENCES[name].format(count=count, detail=detail))
    return lines
