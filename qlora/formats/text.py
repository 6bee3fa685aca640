"""The completion format under the name that people look for: rows with the field `text`."""

from dataclasses import replace

from qlora.formats import completion

FORMAT = replace(completion.FORMAT, name="text")
