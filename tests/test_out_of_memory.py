"""Memory that is short, by every name that torch and its libraries give it."""

import errno
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands_for_tests import qlora

from qlora.errors import OutOfMemoryError
from qlora.memory.oom import out_of_memory_explained
from qlora.recipe import Recipe
from qlora.runtime.out_of_memory import is_out_of_memory
from qlora.training import train as loop
from qlora.training.session import Session
from qlora.training.train import train

RecipeFile = Callable[..., Path]

SHORTAGES = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)"
    ),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    torch.AcceleratorError(
        "CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation'"
    ),  # also pinned memory
    RuntimeError("could not create a primitive"),
    RuntimeError("std::bad_alloc"),
]
OTHERS = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    OSError(errno.ENOSPC, "No space left on device"),
    ValueError("out of memory"),
]


@pytest.mark.parametrize("error", SHORTAGES, ids=lambda error: str(error)[:30])
def test_a_shortage_is_recognised_by_any_name(recipe_file: RecipeFile, error: Exception) -> None:
    assert is_out_of_memory(error)
    recipe = Recipe.load(recipe_file())
    with pytest.raises(OutOfMemoryError, match=r"^out of memory \(.*continue with --resume and") as caught:
        with out_of_memory_explained(recipe):
            raise error
    assert caught.value.exit_code == 6
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", OTHERS, ids=str)
def test_other_errors_are_no_shortage(recipe_file: RecipeFile, error: Exception) -> None:
    assert not is_out_of_memory(error)
    with pytest.raises(type(error), match=str(error).replace("[", r"\[")):
        with out_of_memory_explained(Recipe.load(recipe_file())):
            raise error


def test_a_real_shortage_of_this_machine_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


@pytest.mark.usefixtures("without_forecast")
def test_a_run_continues_with_each_setting_that_the_message_advises(
    recipe_file: RecipeFile, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = recipe_file(training={"save_every": 2, "activation_checkpointing": "none"})
    whole = train(Recipe.load(file, [f"output={tmp(file)}/whole"]), terminal=False)
    take_step = loop.take_step

    def short(session: Session, step: int, tracker: object) -> int:
        if step == 2:
            raise MemoryError
        return take_step(session, step, tracker)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(loop, "take_step", short)
        with pytest.raises(OutOfMemoryError) as caught:
            train(Recipe.load(file), terminal=False)
    advice = str(caught.value).partition("--resume and ")[2].partition(", or ")[0].split(" or ")
    assert advice == ["training.micro_batch_size=1", "training.activation_checkpointing=full"]
    resumed = train(Recipe.load(file, advice), resume=True, terminal=False)
    assert resumed.loss_after == pytest.approx(whole.loss_after, rel=1e-4)
    assert (
        "training.micro_batch_size: 2 then, 1 now. The run computes the same, but rounds differently"
        in caplog.text
    )


def tmp(file: Path) -> Path:
    return file.parent


@pytest.mark.parametrize(
    ("error", "code"),
    [(MemoryError(), 6), (RuntimeError("CUDA error: out of memory"), 6), (OSError("x"), None)],
)
def test_a_command_without_a_recipe_says_it_too(
    monkeypatch: pytest.MonkeyPatch, error: Exception, code: int | None
) -> None:
    def short() -> None:
        raise error

    monkeypatch.setattr("qlora.cli.app", short)
    if code is None:
        with pytest.raises(OSError, match="x"):
            qlora("eval", "run")
        return
    run = qlora("eval", "run")
    assert run.returncode == code
    assert run.stderr.startswith("qlora: out of memory (")
