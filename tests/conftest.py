"""Shared fixtures: a tiny real model on disk, deterministic seeds, no network.

Tiers: `pytest` (seconds to minutes, no GPU), `pytest -m slow`, `pytest -m gpu`.
"""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

# Set before any library reads them: tests must not reach for a network or a W&B account.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["QLORA_CACHE"] = "off"  # each test has its own cache, see below
os.environ.pop("WANDB_API_KEY", None)
# Triton 3.9 warns while this is unset, and a warning is an error here; 1 is its default up to 3.9
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run block by block in numpy; Triton reads this at import

from deprecations_for_tests import heard_deprecations, say_once_again
from tokenizers_for_tests import byte_level
from transformers import LlamaConfig, LlamaForCausalLM

from qlora import bundled

# Two workers on two cores: with more threads each, OpenMP's waiting threads would take cores from the other worker.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let libraries warn on a GPU, where no run has shown their warnings yet; our own warnings remain errors."""
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.filterwarnings("default"), append=False)
            item.add_marker(pytest.mark.filterwarnings("error:the kernel"))


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give each test and its processes an empty cache; the user's cache is never read or written."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("QLORA_CACHE", str(folder))
    return folder


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _heard() -> Iterator[list[str]]:
    with heard_deprecations() as heard:
        yield heard


@pytest.fixture(autouse=True)
def deprecations(_heard: list[str]) -> Iterator[list[str]]:
    """Fail if a library has logged a deprecation since the last test (fixtures included), as a warning would."""
    say_once_again()
    yield _heard
    found = list(dict.fromkeys(_heard))
    _heard.clear()
    if found:
        pytest.fail("a library logged a deprecation:\n" + "\n".join(found), pytrace=False)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a random 2-layer Llama (hidden 64, fp32) and the bundled tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        eos_token_id=1,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for file in bundled.path("bundled/base").glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture
def chatml_base(tiny_llama: Path, tmp_path: Path) -> Path:
    """Return the tiny model with a tokenizer that has ChatML's tokens, the eos </s> and no template."""
    folder = tmp_path / "base"
    shutil.copytree(tiny_llama, folder)
    byte_level(bos=True, chatml=True).save_pretrained(folder)
    return folder


@pytest.fixture
def without_forecast() -> Iterator[None]:
    """Leave out the memory forecast, which takes as long as the steps and has tests of its own."""
    with patch("qlora.memory.run_memory.forecast", side_effect=RuntimeError("not asked for")):
        yield


@pytest.fixture
def in_the_foreground() -> Iterator[None]:
    """Let signals interrupt, also if the tests run in the background of a script or under nohup, where some do not."""
    usual = {
        signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL,
    }  # fmt: skip
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def recipe_file(tmp_path: Path, tiny_llama: Path) -> Callable[..., Path]:
    """Return a function that writes a small recipe for the tiny model and the bundled tickets, updated by keywords."""

    def write(**sections: Any) -> Path:
        import json

        recipe: dict[str, Any] = {
            "base": {"model": str(tiny_llama), "compute_dtype": "float32"},  # auto depends on the CPU
            "adapter": {"rank": 4, "targets": "all-linear"},
            "data": {
                "source": "bundled/tickets/train.jsonl",
                "format": "messages",
                "max_length": 128,
                "limit": 24,
                "held_out": 4,
            },
            "training": {
                "max_steps": 4,
                "micro_batch_size": 2,
                "global_batch_size": 4,
                "samples": 0,
                "eval_every": None,
                "save_every": None,
                "device": "cpu",
            },
            "tracking": {"wandb": {"mode": "disabled"}},
            "output": str(tmp_path / "run"),
        }
        for name, section in sections.items():
            recipe[name] = {**recipe.get(name, {}), **section} if isinstance(section, dict) else section
        file = tmp_path / "recipe.yaml"
        file.write_text(json.dumps(recipe))  # JSON is YAML
        return file

    return write
