"""Untrusted code in a process of its own: its results, its limits, its end."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers_for_tests import byte_level

from qlora.data.chat_template import ChatTemplate
from qlora.errors import DataError
from qlora.formats import BadRow
from qlora.runtime.bounded import Bounded, OutOfBoundsError


def spin() -> None:
    while True:
        pass


def children() -> list[int]:
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def fail(kind: str) -> None:
    raise BadRow(kind, "detail")


def test_results_and_errors_come_back() -> None:
    double = Bounded(lambda number, more=0: 2 * number + more)
    assert [double(number, more=1) for number in range(3)] == [1, 3, 5]
    with pytest.raises(BadRow) as caught:
        Bounded(fail, errors=[BadRow])("kind")
    assert (caught.value.kind, caught.value.detail) == ("kind", "detail")
    with pytest.raises(RuntimeError, match="BadRow: kind: detail"):
        Bounded(fail)("kind")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (spin, "took longer than 0.5 s"),
        (lambda: time.sleep(60), "took longer than 0.5 s"),
        (lambda: bytearray(2**32), "took more than 64"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "too much memory or too deep"),
    ],
)
def test_a_call_out_of_bounds_ends_its_process_and_the_next_one_works(
    call: Callable[[], object], said: str
) -> None:
    run = Bounded(lambda wanted: call() if wanted else "fine", seconds=0.5, memory_bytes=2**26)
    before = children()
    for _ in range(2):
        with pytest.raises(OutOfBoundsError, match=said):
            run(True)
        assert run(False) == "fine"
    del run
    assert children() == before


def test_the_process_ends_with_the_one_that_started_it_and_holds_none_of_its_files() -> None:
    code = (
        "import os, time; from qlora.runtime.bounded import Bounded\n"
        "reader, writer = os.pipe()\n"
        "run = Bounded(os.getpid); print(run(), flush=True)\n"
        "os.close(writer); assert os.read(reader, 1) == b''\n"
        "os.kill(os.getpid(), 9)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    child = Path(f"/proc/{done.stdout.strip()}")
    until = time.monotonic() + 10
    while child.exists() and time.monotonic() < until:
        time.sleep(0.01)
    assert not child.exists()


def test_ctrl_c_reaches_only_the_process_that_the_user_sees() -> None:
    run = Bounded(os.getpid)
    os.kill(run(), signal.SIGINT)
    assert run() in children()


HOSTILE = {
    "nested ranges": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a huge text": "{{ 'a' * 10**11 }}",
    "a wide field": "{{ '%99999999999d' % 1 }}",
    "a huge number": "{{ 99999999**99999999 }}",
    "a filter": "{{ 'a'|center(10**11) }}",
    "a text that doubles": (
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}"
    ),
}


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_template_is_refused_in_time(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate(byte_level(), source, {})
    template._bounded = Bounded(
        template._bounded._function, errors=(BadRow, DataError), seconds=1.0, memory_bytes=2**28
    )
    began = time.monotonic()
    with pytest.raises(
        (DataError, BadRow), match=r"data\.template: writing a conversation took|refused by the chat"
    ):
        template.render([{"role": "user", "content": "Hello"}], [])
    assert time.monotonic() - began < 20


def test_a_macro_that_calls_itself_is_refused() -> None:
    template = ChatTemplate(byte_level(), "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", {})
    with pytest.raises((BadRow, DataError)):
        template.render([{"role": "user", "content": "Hello"}], [])
