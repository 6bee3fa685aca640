"""Alias of the completion format, named after its field `text`."""

from dataclasses import replace

from qlora.formats import completion

FORMAT = replace(completion.FORMAT, name="text")
