"""The data formats by name: how a data set lays out its rows, and what reads them."""

from qlora.formats import alpaca, completion, messages, prompt_completion, sharegpt, text
from qlora.formats.format import BadRow, Completion, Conversation, Format, Message, Row

__all__ = ["FORMATS", "BadRow", "Completion", "Conversation", "Format", "Message", "Row"]

FORMATS: dict[str, Format] = {
    module.FORMAT.name: module.FORMAT
    for module in (alpaca, messages, sharegpt, prompt_completion, completion, text)
}
"""In the order in which messages name them."""
