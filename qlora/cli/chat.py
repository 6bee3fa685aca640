"""`qlora chat`: talk with a fine-tuned model, its base, and other adapters of it."""

import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, Any

import typer

from qlora.cli.arguments import AnyBase, TrustRemoteCode


def chat(
    adapter: Annotated[
        str, typer.Argument(metavar="RUN_OR_ADAPTER", help="A run's folder or an adapter's folder.")
    ],
    others: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter", metavar="NAME=FOLDER", help="Another adapter of the same base; repeatable."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 256,
    temperature: Annotated[
        float,
        typer.Option(min=0.0, help="0: always the likeliest token; above: drawn, the wilder the higher."),
    ] = 0.0,
    history: Annotated[
        bool | None,
        typer.Option(
            "--history/--no-history",
            help="Whether a question follows the ones before it. Left out: as it was in the rows learned from.",
        ),
    ] = None,
    any_base: AnyBase = False,
    trust_remote_code: TrustRemoteCode = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Chat with base + adapter; /help lists what else a line can be.

    [bold]qlora chat runs/quickstart --adapter poet=runs/poet[/bold]
    """
    named = dict(_pair(other) for other in others or [])
    from qlora.inference.chat import open_chat

    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    screen = Terminal() if interactive else Plain()
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    settings |= {"device": device, "any_base": any_base, "trust_remote_code": trust_remote_code}
    conversation = open_chat(adapter, named, screen, history=history, **settings)
    if interactive:
        with suppress(ImportError):
            import readline  # noqa: F401  (input() then edits and remembers lines)
        screen.note(f"answering: {' and '.join(conversation.speakers)}; /help for help, Ctrl-D to end")
        if not conversation.history:
            screen.note("each question is posed on its own, as the rows were that the model learned from")
    while (line := _read(interactive)) not in (None, "/quit", "/exit"):
        assert line is not None
        stopped_by = conversation.say(line)
        if stopped_by in (signal.SIGTERM, signal.SIGHUP):
            sys.exit(128 + stopped_by)


def _read(interactive: bool) -> str | None:
    """The next line; None at the end."""
    while True:
        try:
            return input("> " if interactive else "").strip()
        except EOFError:
            if interactive:
                print()
            return None
        except KeyboardInterrupt:
            if not interactive:
                raise
            print("  (Ctrl-D or /quit ends)")


def _pair(text: str) -> tuple[str, str]:
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise typer.BadParameter(f"--adapter wants NAME=FOLDER, not {text!r}")
    return name, folder


class Plain:
    """Answers to pipes and files: a line each, named where there are two. Remarks go to standard error."""

    def begin(self, speakers: Sequence[str]) -> None:
        """Answers follow."""
        self._named, self._speaker = len(speakers) > 1, ""

    def text(self, speaker: str, piece: str) -> None:
        """The next piece of an answer."""
        if speaker != self._speaker and self._named:
            print(f"\n{speaker}: " if self._speaker else f"{speaker}: ", end="")
        self._speaker = speaker
        print(piece, end="", flush=True)

    def end(self) -> None:
        """The end of the last line."""
        print(flush=True)

    def note(self, text: str) -> None:
        """A remark."""
        print(text, file=sys.stderr, flush=True)


class Terminal:
    """Answers as they come; two of them in columns."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(highlight=False, markup=False)
        self._answers: dict[str, str] = {}
        self._live: Any = None

    def begin(self, speakers: Sequence[str]) -> None:
        """Two answers stand side by side from the beginning."""
        self._answers = dict.fromkeys(speakers, "")
        if len(speakers) > 1:
            from rich.live import Live

            self._live = Live(self._columns(), console=self._console)
            self._live.start()

    def text(self, speaker: str, piece: str) -> None:
        """The next piece of an answer."""
        self._answers[speaker] += piece
        if self._live is None:
            self._console.file.write(_harmless(piece))
            self._console.file.flush()
        else:
            self._live.update(self._columns(), refresh=True)

    def end(self) -> None:
        """A line of its own for the next prompt."""
        if self._live is None:
            self._console.print()
        else:
            self._live.stop()
            self._live = None

    def note(self, text: str) -> None:
        """A remark, dimmed."""
        self._console.print(text, style="dim", soft_wrap=True)

    def _columns(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, expand=True, padding=(0, 2, 0, 0), header_style="bold cyan")
        for speaker in self._answers:
            table.add_column(speaker, ratio=1, overflow="fold")
        table.add_row(*(Text(_harmless(answer)) for answer in self._answers.values()))
        return table


def _harmless(text: str) -> str:
    """Nothing that a model writes may command the terminal."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in text)
