"""The data formats by name: each is a layout of rows, with its parser."""

from qlora.formats import alpaca, completion, messages, prompt_completion, sharegpt, text
from qlora.formats.format import BadRow, Completion, Conversation, Format, Message, NotTrained, Row

__all__ = [
    "FIELDS",
    "FORMATS",
    "BadRow",
    "Completion",
    "Conversation",
    "Format",
    "Message",
    "NotTrained",
    "Row",
]

FORMATS: dict[str, Format] = {
    module.FORMAT.name: module.FORMAT
    for module in (alpaca, messages, sharegpt, prompt_completion, completion, text)
}
"""formats by name, in the order of messages and documentation"""

FIELDS = frozenset(field for format in FORMATS.values() for field in format.fields)
"""default column names of all formats"""
