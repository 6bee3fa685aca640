"""The variables of a launcher: what is wrong is named, and one process alone prints whatever its rank is."""

import pytest
from accelerate.state import AcceleratorState, PartialState
from commands_for_tests import qlora

from qlora.data import pipe
from qlora.errors import DataError, UsageError
from qlora.recipe import Recipe
from qlora.runtime.distributed import DataParallel
from qlora.runtime.launch import is_main, process_count


def set_to(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "first"}, "RANK is 'first', not a whole number"),
        ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE is '2.0', not a whole number"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x', not a whole number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is 0, and a run has at least one process"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is 2, and the 2 processes of WORLD_SIZE have ranks from 0"),
    ],
)
def test_a_wrong_variable_is_named(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    set_to(monkeypatch, **variables)
    run = qlora("train", "quickstart")
    assert (run.returncode, run.stdout) == (UsageError.exit_code, "")
    assert message in run.stderr
    assert "or unset RANK, LOCAL_RANK and WORLD_SIZE" in run.stderr
    for reads in (lambda: DataParallel.of(Recipe.load("quickstart")), pipe.spooled.__wrapped__):
        with pytest.raises(UsageError, match=message):
            reads()


def test_processes_without_an_address_are_told_to_use_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    set_to(monkeypatch, WORLD_SIZE="2", RANK="0", LOCAL_RANK="0")
    for state in (PartialState, AcceleratorState):  # as in a process that has made no accelerator yet
        monkeypatch.setattr(state, "_shared_state", {})
    with pytest.raises(
        UsageError, match=r"cannot find each other: .*MASTER_ADDR.* torchrun or accelerate launch"
    ):
        DataParallel.of(Recipe.load("quickstart", ["training.device=cpu"]))


@pytest.mark.parametrize(
    ("world", "rank", "main"),
    [("", "1", True), ("1", "1", True), ("2", "0", True), ("2", "1", False), ("", "", True)],
)
def test_the_only_and_the_first_process_print(
    monkeypatch: pytest.MonkeyPatch, world: str, rank: str, main: bool
) -> None:
    set_to(monkeypatch, WORLD_SIZE=world, RANK=rank)
    assert is_main() == main
    assert process_count() == int(world or 1)


def test_processes_cannot_share_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    set_to(monkeypatch, WORLD_SIZE="2", RANK="0")
    with pytest.raises(DataError, match="several processes cannot share the standard input"):
        pipe.spooled.__wrapped__()
