"""Progress of loading a base: tensors are counted, and the hub's bars appear only on a terminal."""

import sys
from pathlib import Path

import pytest
from huggingface_hub.utils.tqdm import are_progress_bars_disabled
from transformers.utils.logging import set_tqdm_hook

from qlora.model import progress
from qlora.model.load import load_base
from qlora.recipe import Base


def test_the_tensors_of_a_base_are_counted(tiny_llama: Path) -> None:
    lines: list[str] = []
    with progress.tensors_counted(lines.append):
        model = load_base(Base(model=str(tiny_llama), compute_dtype="float32"))
    count = len(list(model.named_parameters()))
    assert lines[0] == f"loading the base: tensor 1 of {count}"
    assert lines[-1] == f"loading the base: tensor {count} of {count}"
    before = set_tqdm_hook(None)
    assert before is None, "the hook must be removed at the end"


def test_only_a_hub_id_is_on_the_hub(tiny_llama: Path) -> None:
    assert progress.is_on_hub(Base(model="someone/model"))
    assert not progress.is_on_hub(Base(model=str(tiny_llama)))
    assert not progress.is_on_hub(Base(model="bundled/base"))
    assert not progress.is_on_hub(Base(model="huggyllama/llama-7b", init="synthetic"))


@pytest.mark.parametrize("terminal", [True, False])
def test_the_hubs_bars_are_shown_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    hidden: list[bool] = []

    def folder(base: Base) -> Path:
        hidden.append(are_progress_bars_disabled())
        return Path("folder")

    monkeypatch.setattr(progress, "checkpoint_folder", folder)
    monkeypatch.setattr(progress.constants, "HF_HUB_DISABLE_PROGRESS_BARS", None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    progress.disable_progress_bars()
    assert progress.download(Base(model="someone/model")) == Path("folder")
    assert hidden == [not terminal]
    assert are_progress_bars_disabled()
