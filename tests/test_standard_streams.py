"""Commands whose standard streams are closed, or carry bytes that are no text."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qlora.errors import RecipeError, SaveError
from qlora.runtime.streams import open_standard_streams


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = command.replace("PYTHON", sys.executable)
    return subprocess.run(
        ["sh", "-c", command], capture_output=True, check=False, env=os.environ | environment, timeout=60
    )


@pytest.mark.parametrize("closed", ["<&- >&- 2>&-", "2>&-"])
def test_a_command_ends_with_its_own_code_where_streams_are_closed(closed: str) -> None:
    assert shell(f"PYTHON -m qlora recipes list {closed}").returncode == 0
    run = shell(f"PYTHON -m qlora check no-such-recipe {closed}")
    assert (run.returncode, run.stderr) == (RecipeError.exit_code, b"")


def test_no_file_of_the_program_gets_the_descriptor_of_a_closed_stream(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, subprocess, sys\n"
        "from qlora.runtime.streams import open_standard_streams\n"
        "open_standard_streams()\n"
        f"file = open({str(tmp_path / 'result')!r}, 'w')\n"
        "print('lost'), print('lost', file=sys.stderr)\n"
        "subprocess.run(['sh', '-c', 'echo lost; echo lost >&2; cat'], check=True)\n"
        "file.write(f'{file.fileno() > 2} {sys.stdin.read()!r}')\n"
    )
    run = shell(f"PYTHON {script} <&- >&- 2>&-")
    assert (run.returncode, (tmp_path / "result").read_text()) == (0, "True ''")


def test_input_that_is_no_text_is_passed_on() -> None:
    code = (
        "from qlora.runtime.streams import open_standard_streams as o; import sys; o(); print(ascii(input()))"
    )
    run = shell(f"printf 'a\\377\\n' | PYTHON -c '{code}'", PYTHONIOENCODING="utf-8")
    assert run.stdout == b"'a\\udcff'\n"


def test_open_streams_are_left_as_they_are() -> None:
    before = sys.stdin, sys.stdout, sys.stderr
    with open(os.devnull) as sys.stdin:  # noqa: PTH123
        try:
            open_standard_streams()
            assert (sys.stdout, sys.stderr, sys.stdin.errors) == (*before[1:], "surrogateescape")
        finally:
            sys.stdin = before[0]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_a_command_without_room_for_its_text_does_its_work_and_says_so(tmp_path: Path) -> None:
    copy = tmp_path / "copy.yaml"
    run = shell(f"PYTHON -m qlora recipes copy quickstart {copy} > /dev/full")
    assert run.returncode == SaveError.exit_code
    assert run.stderr == b"qlora: standard output: No space left on device; a part of the text is lost\n"
    assert copy.is_file()
    run = shell("PYTHON -m qlora check no-such-recipe > /dev/full")
    assert run.returncode == RecipeError.exit_code
