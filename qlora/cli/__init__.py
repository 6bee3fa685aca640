"""The command line: one file a command. Nothing heavy is imported before a command needs it."""

import signal
import sys
from types import FrameType

import typer

from qlora.cli import adapter, cache, recipes
from qlora.cli.chat import chat
from qlora.cli.check import check
from qlora.cli.data import data
from qlora.cli.estimate import estimate
from qlora.cli.evaluate import evaluate
from qlora.cli.generate import generate
from qlora.cli.merge import merge
from qlora.cli.profile import profile
from qlora.cli.report import report
from qlora.cli.train import train
from qlora.errors import QloraError
from qlora.runtime.signals import heeded
from qlora.runtime.streams import unbreakable_output

app = typer.Typer(
    help="Fine-tune 7B-65B language models on one GPU from a recipe.",
    no_args_is_help=True,
    add_completion=False,
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
app.command("merge")(merge)
app.command("report")(report)
app.add_typer(adapter.app, name="adapter")
app.add_typer(recipes.app, name="recipes")
app.add_typer(cache.app, name="cache")


def main() -> None:
    """The `qlora` program. Errors meant for the user are one message on standard error and their exit code."""
    for number in heeded([signal.SIGTERM, signal.SIGHUP]):
        signal.signal(number, _terminate)
    with unbreakable_output():
        try:
            app()
        except QloraError as error:
            print(f"qlora: {error}", file=sys.stderr)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            sys.exit(128 + signal.SIGINT)


def _terminate(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)
