"""Finds the examples in README.md and docs/ and knows how a test runs each of them.

Examples run as they are written: `console` blocks hold commands after `$ ` and their output, `python` blocks share a
namespace, and blocks with a title are files. A remark before a block, `<!-- example: ... -->`, marks a special case:
`not run: <why>` (its commands are only parsed), `output of the full run` (a shortened run prints other text), `slow`.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

# Overrides that shorten a run. Later overrides win, so these come last.
SHORT = [
    "training.max_steps=2",
    "training.eval_every=100",  # only before and after these steps
    "training.samples=1",
    "training.sample_tokens=4",
    "optimizer.warmup_steps=0",
    "data.held_out=4",
    "data.limit=64",
]
SHORT_ANSWER = ["--max-new-tokens", "4"]

_FENCE = re.compile(
    r"(?:^<!-- example: (?P<remark>.+?) -->\n)?^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<text>.*?)^(?P=indent)```$",
    re.M | re.S,
)
_NUMBER = re.compile(r"[-+−]?\d[\d,.]*(e[-+]?\d+)?")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    title: str
    text: str
    remark: str

    @property
    def place(self) -> str:
        """file:line, for messages."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def commands(self) -> Iterator["Command"]:
        """The commands of a console block, each with its input and output."""
        lines = self.text.split("\n")
        while lines:
            line = lines.pop(0)
            if not line.startswith("$ "):
                continue
            while line.endswith("\\"):
                line = line[:-1] + lines.pop(0).strip()
            shown: list[str] = []
            while lines and not lines[0].startswith("$ "):
                shown.append(lines.pop(0))
            typed = [text[2:] for text in shown if text.startswith("> ")]
            printed = [text for text in shown if not text.startswith("> ")]
            for part in line[2:].split(" && "):
                yield Command(self, part.strip(), typed, printed)


@dataclass(frozen=True)
class Command:
    """One command of a console block."""

    block: Block
    text: str
    typed: list[str]
    printed: list[str]

    @property
    def words(self) -> list[str]:
        """The words of the command, split as a shell splits them and without comments."""
        return shlex.split(self.text, comments=True)

    @property
    def arguments(self) -> list[str] | None:
        """The arguments of `qlora`; None for another program."""
        words = [word for word in self.words if not re.fullmatch(r"[A-Z_]+=\S*", word)]
        if words[:1] == ["time"]:
            words = words[1:]
        if words[:1] == ["qlora"]:
            return words[1:]
        return words[3:] if words[:3] == ["python", "-m", "qlora"] else None

    @property
    def fails(self) -> bool:
        """True if the page shows an error message as the output."""
        return any(line.startswith("qlora: ") for line in self.printed)

    @property
    def shortened(self) -> list[str] | None:
        """The arguments that a test uses."""
        arguments = self.arguments
        if arguments and arguments[0] in ("train", "profile"):
            again = arguments[0] == "train" and not self.fails and "--resume" not in arguments
            return [*arguments, *SHORT, *(["--fresh"] if again else [])]
        if arguments and arguments[0] in ("generate", "chat") and SHORT_ANSWER[0] not in arguments:
            return [*arguments, *SHORT_ANSWER]
        return arguments


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page, in order."""
    text, found = page.read_text(), []
    for match in _FENCE.finditer(text):
        language, _, rest = match["info"].strip().partition(" ")
        title = re.search(r'title="([^"]+)"', rest)
        body = re.sub(f"^{match['indent']}", "", match["text"], flags=re.M)
        line = text.count("\n", 0, match.start("info")) + 1
        found.append(Block(page, line, language, title[1] if title else "", body, match["remark"] or ""))
    return found


def words_of(line: str) -> str:
    """Return a line of output without the parts that differ between runs: numbers, table rules and spaces."""
    line = re.sub(r"[─━│┃|╷╵┼╇╪═-]{2,}", " ", line)
    return " ".join(_NUMBER.sub("#", line).split())


def missing_from(printed: str, expected: list[str]) -> str | None:
    """Return the first expected line that is missing from the output; None if all lines are there, in order.

    Numbers are ignored. A line `...` matches any lines; a line that ends in ` ...` matches every line with this
    beginning.
    """
    actual = [line for line in map(words_of, printed.splitlines()) if line]
    position, anywhere = 0, True
    for line in map(words_of, expected):
        if not line:
            continue
        if line == "...":
            anywhere = True
            continue
        head = line.removesuffix(" ...")
        rest = range(position, len(actual)) if anywhere else range(position, min(position + 1, len(actual)))
        for index in rest:
            if actual[index] == line or (head != line and actual[index].startswith(head)):
                position, anywhere = index + 1, False
                break
        else:
            return line
    return None
