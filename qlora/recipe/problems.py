"""Where the settings of a document stand, and what is wrong with them."""

import re
from dataclasses import dataclass, field
from typing import Any, Final

KeyPath = tuple[str | int, ...]

# What YAML 1.2 lets stand in a file. Escapes such as "\0" could still make one of the others
FORBIDDEN = re.compile(r"[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
SECRET = re.compile(
    r"\b(hf_|sk-|gh[pousr]_|github_pat_|wandb_v1_|AKIA)[\w-]{12,}|://[^/\s:@]{,200}:[^/\s@]{1,200}@", re.ASCII
)

UNUSABLE: Final = object()
"""Stands for a value that was refused when it was read, so that nobody complains about it a second time."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a key stands (line and column from 1; 0 on the command line), and its value as it was written."""

    source: str
    line: int = 0
    column: int = 0
    written: str = ""

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.line else self.source


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: where, with which setting, and in words."""

    place: Place
    path: KeyPath
    text: str

    def __str__(self) -> str:
        key = f"{shorten(dotted(self.path), 120)}: " if self.path else ""
        return f"{self.place}: {key}{self.text}"


@dataclass(slots=True)
class Document:
    """Nested settings, the place of every key and list item, and what was wrong when they were read."""

    source: str
    value: Any = None
    places: dict[KeyPath, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def setting(self, *names: str) -> Any:
        """The value of a setting as it was written, whether it fits or not; None if it was not."""
        value = self.value
        for name in names:
            value = value.get(name) if isinstance(value, dict) else None
        return value

    def place(self, path: KeyPath) -> Place:
        """The place of a setting, or of the innermost one around it that was written."""
        around = (path[:end] for end in range(len(path), -1, -1))
        return next((self.places[part] for part in around if part in self.places), Place(self.source))


def dotted(path: KeyPath) -> str:
    """`("adapter", "targets", 0)` -> `adapter.targets[0]`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def shorten(text: str, width: int = 40) -> str:
    """A piece of a recipe on one line of a message, without what must not be printed."""
    line = " ".join(SECRET.sub("…", text[: 10 * width]).split())
    line = FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", line)
    return line if len(line) <= width else f"{line[: width - 1]}…"
