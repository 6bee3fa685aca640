"""Expressions in a stranger's adapter_config.json that would not end."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from methods_for_tests import adapted, tiny

from qlora.adapter import expressions, load_adapter, save_adapter
from qlora.adapter.algebra import tensors
from qlora.errors import ModelError
from qlora.runtime.bounded import Bounded

ENDLESS = r"((\w|\.)+)+!"
CONFIGS: dict[str, dict[str, Any]] = {
    "target_modules": {"target_modules": ENDLESS},
    "rank_pattern": {"rank_pattern": {ENDLESS: 2}},
    "alpha_pattern": {"alpha_pattern": {ENDLESS: 2}},
    "exclude_modules": {"exclude_modules": ENDLESS},
}


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(expressions, "Bounded", lambda function: Bounded(function, seconds=1.0))
    return save_adapter(adapted(tiny(tiny_llama), "lora", rank=2), tmp_path / "adapter")


@pytest.mark.parametrize("change", CONFIGS.values(), ids=CONFIGS)
def test_an_expression_without_end_is_refused_in_time(
    folder: Path, tiny_llama: Path, change: dict[str, Any]
) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    began = time.monotonic()
    with pytest.raises(ModelError, match=r"adapter_config\.json: matching its regular expressions"):
        load_adapter(tiny(tiny_llama), folder)
    with pytest.raises(ModelError, match=r"adapter_config\.json: matching its regular expressions"):
        tensors.read(folder)
    assert time.monotonic() - began < 30


def test_usual_expressions_still_work(folder: Path, tiny_llama: Path) -> None:
    file = folder / "adapter_config.json"
    change = {
        "target_modules": r".*\.(self_attn|mlp)\.[a-z]+_proj",
        "rank_pattern": {r"layers\.\d+\.mlp\..*": 2},
    }
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    load_adapter(tiny(tiny_llama), folder)
    assert len(tensors.read(folder).layers) > 3
