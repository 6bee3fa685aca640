"""`qlora chat`: chat with a fine-tuned model, its base, and other adapters."""

import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, Any

import typer

from qlora.cli.arguments import (
    IMPORTS,
    AnyBase,
    Device,
    OtherAdapters,
    RunOrAdapter,
    System,
    TrustRemoteCode,
    folders_by_name,
    show_device,
    startup_for,
)


def chat(
    adapter: RunOrAdapter,
    others: OtherAdapters = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of an answer in tokens.")] = 256,
    temperature: Annotated[
        float,
        typer.Option(min=0.0, help="0 takes the most likely token; higher values draw more varied answers."),
    ] = 0.0,
    history: Annotated[
        bool | None,
        typer.Option(
            "--history/--no-history",
            help="Ask each question after the conversation so far, or on its own. Default: as in the training rows.",
        ),
    ] = None,
    system: System = None,
    any_base: AnyBase = False,
    trust_remote_code: TrustRemoteCode = False,
    device: Device = "auto",
) -> None:
    """Chat with a fine-tuned model, its base, and other adapters.

    Type /help for the commands that switch between them, Ctrl-D to end.
    The system prompt is the one that all training rows share, if they share one.

    [bold]qlora chat runs/quickstart --adapter poet=runs/poet[/bold]
    """
    named = folders_by_name(others)
    startup = startup_for()
    with startup.stage(IMPORTS):
        from qlora.data.prompts import NO_SYSTEM
        from qlora.inference.chat import open_chat

    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    screen = Terminal() if interactive else Plain()
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    settings |= {"device": device, "any_base": any_base, "trust_remote_code": trust_remote_code}
    show_device(startup, device)
    with startup.stage("loading base and adapters"):
        conversation = open_chat(adapter, named, screen, history=history, system=system, **settings)
    if interactive:
        with suppress(ImportError):
            import readline  # noqa: F401  (gives input() line editing and history)
        screen.note(f"answering: {' and '.join(conversation.speakers)}; /help for help, Ctrl-D to end")
        if not conversation.history:
            screen.note("each question is asked on its own, without the conversation so far")
    if interactive or conversation.system_prompt != NO_SYSTEM:
        screen.note(conversation.system_prompt)
    while (line := _read(interactive)) not in (None, "/quit", "/exit"):
        assert line is not None
        stopped_by = conversation.say(line)
        if stopped_by in (signal.SIGTERM, signal.SIGHUP):
            sys.exit(128 + stopped_by)


def _read(interactive: bool) -> str | None:
    """Return the next line, or None at the end of the input."""
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
            print("  (Ctrl-D or /quit ends the chat)")


class Plain:
    """Screen for pipes and files: one line per answer, named if there are two. Notes go to standard error."""

    def begin(self, speakers: Sequence[str]) -> None:
        """Start the answers of `speakers`."""
        self._named, self._speaker = len(speakers) > 1, ""

    def text(self, speaker: str, piece: str) -> None:
        """Print the next piece of an answer."""
        if speaker != self._speaker and self._named:
            print(f"\n{speaker}: " if self._speaker else f"{speaker}: ", end="")
        self._speaker = speaker
        print(piece, end="", flush=True)

    def end(self) -> None:
        """Print the newline that ends an answer."""
        print(flush=True)

    def note(self, text: str) -> None:
        """Print a note."""
        print(text, file=sys.stderr, flush=True)


class Terminal:
    """Screen for a terminal: answers appear as they are generated, two of them in columns."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(highlight=False, markup=False)
        self._answers: dict[str, str] = {}
        self._live: Any = None

    def begin(self, speakers: Sequence[str]) -> None:
        """Start the answers of `speakers`; open the columns if there are two."""
        self._answers = dict.fromkeys(speakers, "")
        if len(speakers) > 1:
            from rich.live import Live

            self._live = Live(self._columns(), console=self._console)
            self._live.start()

    def text(self, speaker: str, piece: str) -> None:
        """Print the next piece of an answer."""
        self._answers[speaker] += piece
        if self._live is None:
            self._console.file.write(piece)
            self._console.file.flush()
        else:
            self._live.update(self._columns(), refresh=True)

    def end(self) -> None:
        """End the answers, so that the next prompt starts on a new line."""
        if self._live is None:
            self._console.print()
        else:
            self._live.stop()
            self._live = None

    def note(self, text: str) -> None:
        """Print a note, dimmed."""
        self._console.print(text, style="dim", soft_wrap=True)

    def _columns(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, expand=True, padding=(0, 2, 0, 0), header_style="bold cyan")
        for speaker in self._answers:
            table.add_column(speaker, ratio=1, overflow="fold")
        table.add_row(*(Text(answer) for answer in self._answers.values()))
        return table
