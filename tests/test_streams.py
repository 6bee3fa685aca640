"""Text of others cannot control the terminal, whatever of the package's output it is in."""

import io
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from commands_for_tests import qlora
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.progress import Progress
from tqdm import tqdm

from qlora.errors import RecipeError
from qlora.runtime.streams import Unbreakable, harmless

RecipeFile = Callable[..., Path]
EVIL = "\x1b]0;title\x07 \x1b[2J \x1b[8mhidden \x9b31m \r over \x08 \u202e tail\x1b"


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_commands_to_the_terminal_are_replaced() -> None:
    for cursor in (False, True):
        shown = harmless(EVIL, cursor=cursor)
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", shown)
        assert shown.count("\ufffd") == 9


@given(text=st.text(), cursor=st.booleans())
def test_nothing_but_colours_and_a_bar_s_movements_are_left(text: str, cursor: bool) -> None:
    for evil in (text, text.replace("a", "\x1b[")):
        rest = re.sub(r"\x1b\[[0-79;]*m|\x1b\[(\?25[hl]|[0-9]*A|2K)|\r", "", harmless(evil, cursor=cursor))
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", rest)


def test_ordinary_text_of_any_language_is_left_as_it_is() -> None:
    text = "naïve  日本語 עברית\u200f \U0001f469\u200d\U0001f373\ttab\nline"
    assert harmless(text) == text


def test_colours_and_progress_bars_of_ours_still_work() -> None:
    plain, wrapped = Terminal(), Terminal()
    for stream in (plain, Unbreakable(wrapped)):  # type: ignore[assignment]
        console = Console(file=stream, force_terminal=True, width=60, color_system="truecolor")
        console.print("[bold red on blue]text[/]", "[dim]more[/dim]")
        with Progress(console=console, auto_refresh=False) as progress:
            task = progress.add_task("steps", total=3)
            for _ in range(3):
                progress.advance(task)
                progress.refresh()
    drop = re.compile(r"\d:\d\d:\d\d|-:--:--")
    assert drop.sub("", wrapped.getvalue()) == drop.sub("", plain.getvalue())
    assert "\x1b[2K" in wrapped.getvalue()


def test_bars_of_other_libraries_still_work_on_standard_error() -> None:
    plain, errors, output = Terminal(), Terminal(), Terminal()
    for stream in (plain, Unbreakable(errors), Unbreakable(output, whole=True)):  # type: ignore[list-item]
        bar = tqdm(total=3, file=stream, mininterval=0, bar_format="{n}/{total} {bar}", ncols=30)
        for _ in range(3):
            bar.update()
        bar.close()
    assert plain.getvalue().count("\r") > 2
    assert errors.getvalue() == plain.getvalue()
    assert "\r1/3" not in output.getvalue()


def test_text_that_the_encoding_lacks_is_shown_as_codes() -> None:
    raw = io.BytesIO()
    stream = Unbreakable(io.TextIOWrapper(raw, encoding="ascii"))  # type: ignore[arg-type]
    stream.write("caf\xe9 \udcff")
    stream.flush()
    assert raw.getvalue() == b"caf\\xe9 \\udcff"


@pytest.mark.parametrize("place", ["file", "column", "key", "value"])
def test_messages_about_a_stranger_s_data_are_harmless(
    recipe_file: RecipeFile, tmp_path: Path, place: str
) -> None:
    data = tmp_path / (f"{EVIL.replace('/', '')}.csv" if place == "file" else "rows.csv")
    data.write_text(f"{EVIL if place == 'column' else 'a'},b\n1,2\n", newline="")
    arguments = {"key": [f"data.{EVIL}=1"], "value": [f"adapter.rank={EVIL}"]}.get(
        place, [f"data.source={data}"]
    )
    run = qlora("check", recipe_file(), *arguments)
    assert run.returncode != 0
    assert run.stderr.strip()
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", run.stdout + run.stderr)


def test_a_real_terminal_gets_no_command_of_a_file_name(tmp_path: Path) -> None:
    reader, writer = pty.openpty()
    name = tmp_path / "\x1b]0;owned\x07.yaml"
    command = [sys.executable, "-m", "qlora", "check", str(name)]
    run = subprocess.run(
        command, stdout=writer, stderr=writer, check=False, env=os.environ | {"TERM": "xterm"}
    )
    shown = os.read(reader, 65536).decode()
    assert run.returncode == RecipeError.exit_code
    assert "owned" in shown
    assert "\x1b]" not in shown
    assert "\x07" not in shown
