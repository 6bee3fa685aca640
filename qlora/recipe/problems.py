"""The settings of a document, their places in the text, and the problems with them."""

import re
from dataclasses import dataclass, field
from typing import Any, Final

KeyPath = tuple[str | int, ...]

# all but the characters that YAML 1.2 allows in a file; an escape such as "\0" can still produce one of them
FORBIDDEN = re.compile(r"[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
SECRET = re.compile(
    r"\b(hf_|sk-|gh[pousr]_|github_pat_|wandb_v1_|AKIA)[\w-]{12,}|://[^/\s:@]{,200}:[^/\s@]{1,200}@"
    r"|(?<![\w/-])[0-9a-f]{40}(?![\w/-])",  # an older key of Weights & Biases; a folder can be named by a commit
    re.ASCII,
)

UNUSABLE: Final = object()
"""placeholder for a value that was rejected while reading, so that it is not reported a second time"""


@dataclass(frozen=True, slots=True)
class Place:
    """The place of a key (line and column from 1; 0 on the command line), and its value as written."""

    source: str
    line: int = 0
    column: int = 0
    written: str = ""

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.line else self.source


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem: its place, the setting, and the message."""

    place: Place
    path: KeyPath
    text: str

    def __str__(self) -> str:
        key = f"{shorten(dotted(self.path), 120)}: " if self.path else ""
        return f"{self.place}: {key}{self.text}"


@dataclass(slots=True)
class Document:
    """Nested settings, the place of every key and list item, and the problems found while reading."""

    source: str
    value: Any = None
    places: dict[KeyPath, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def setting(self, *names: str) -> Any:
        """Return the unchecked value of a setting; None if it is not set."""
        value = self.value
        for name in names:
            value = value.get(name) if isinstance(value, dict) else None
        return value

    def place(self, path: KeyPath) -> Place:
        """Return the place of a setting, or else of the innermost enclosing one that has a place."""
        around = (path[:end] for end in range(len(path), -1, -1))
        return next((self.places[part] for part in around if part in self.places), Place(self.source))


def dotted(path: KeyPath) -> str:
    """Join the parts of a path: `("adapter", "targets", 0)` -> `adapter.targets[0]`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def shorten(text: str, width: int = 40) -> str:
    """Shorten text of a recipe to `width` characters on one line, without secrets and control characters."""
    line = " ".join(SECRET.sub("…", text[: 10 * width]).split())
    line = FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", line)
    return line if len(line) <= width else f"{line[: width - 1]}…"
