"""The type of a function that shows how far a stage is."""

from collections.abc import Callable

Progress = Callable[[str], object]
"""shows a line such as "tokenizing rows.jsonl: 12,000 of 52,002 rows", which replaces the line before it"""
