"""The command line: one file per command. A command imports torch and other large libraries only when it runs."""

import signal
import sys
from typing import Annotated, NoReturn

import typer

from qlora.cli import adapter, cache, recipes
from qlora.cli.chat import chat
from qlora.cli.check import check
from qlora.cli.compare import compare
from qlora.cli.data import data
from qlora.cli.env import env
from qlora.cli.estimate import estimate
from qlora.cli.evaluate import evaluate
from qlora.cli.export import export
from qlora.cli.generate import generate
from qlora.cli.merge import merge
from qlora.cli.profile import profile
from qlora.cli.report import report
from qlora.cli.serve import serve
from qlora.cli.train import train
from qlora.errors import OutOfMemoryError, QloraError, SaveError, UsageError, first_line
from qlora.runtime.signals import SIGNALS, Ending, not_ignored
from qlora.runtime.streams import unbreakable_output

app = typer.Typer(
    help="Fine-tune 7B-65B language models on one GPU from a recipe.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command("train")(train)
app.command("check")(check)
app.command("estimate")(estimate)
app.command("profile")(profile)
app.command("data")(data)
app.command("eval")(evaluate)
app.command("generate")(generate)
app.command("chat")(chat)
app.command("serve")(serve)
app.command("merge")(merge)
app.command("export")(export)
app.command("report")(report)
app.command("compare")(compare)
app.command("env")(env)
app.add_typer(adapter.app, name="adapter")
app.add_typer(recipes.app, name="recipes")
app.add_typer(cache.app, name="cache")


def main() -> None:
    """Run the `qlora` program. A QloraError ends it with one message on standard error and its exit code.

    An OSError that names a file does the same, with the exit code of a UsageError. A command that does all of its work,
    but whose output cannot be written, ends with the code of a SaveError.
    """
    ending = Ending()
    for number in not_ignored(SIGNALS):
        # A job that a script put in the background ignores SIGINT
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, ending)
    with unbreakable_output() as output:
        try:
            app()
        except (KeyboardInterrupt, SystemExit) as end:
            # typer ends with the code of a signal and says nothing
            if isinstance(end, SystemExit) and end.code != 128 + (ending.signal_number or 0):
                output.flush()
                if output.failure and not end.code:
                    _exit(
                        f"standard output: {output.failure}; a part of the text is lost", SaveError.exit_code
                    )
                raise
            _exit("interrupted", 128 + (ending.signal_number or signal.SIGINT))
        except Exception as error:
            if ending.broke(error):
                _exit("interrupted", 128 + (ending.signal_number or 0))
            if isinstance(error, QloraError):
                _exit(str(error), error.exit_code)
            if not isinstance(error, RuntimeError | MemoryError | OSError):
                raise
            if (shortage := _shortage(error)) is not None:
                _exit(shortage, OutOfMemoryError.exit_code)
            if not (isinstance(error, OSError) and error.filename is not None and error.strerror):
                raise
            # A name that is too long, a loop of links, a file of another user: no path escapes these
            _exit(f"{error.filename}: {error.strerror}", UsageError.exit_code)


def _exit(message: str, code: int) -> NoReturn:
    """End the process with a message on standard error."""
    print(f"qlora: {message}", file=sys.stderr)
    sys.exit(code)


def _shortage(error: Exception) -> str | None:
    """Return a message if memory was short in a command without settings to advise, else None."""
    from qlora.runtime.out_of_memory import is_out_of_memory

    if not is_out_of_memory(error):
        return None
    return f"out of memory ({first_line(error)}). Free memory of other programs, or use a smaller base or --device cpu"


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    from qlora.runtime.environment import DISTRIBUTION, package_version

    print(f"{DISTRIBUTION} {package_version()}")
    raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Options of `qlora` itself."""
