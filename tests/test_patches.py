"""Patches of other libraries: the patched code still exists, has the expected signature, and is restored."""

import inspect
import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch
from torch import nn
from transformers import masking_utils
from transformers.quantizers import HfQuantizer, auto
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from qlora.runtime import patches
from qlora.runtime.fake import is_fake

Patch = Callable[[], AbstractContextManager[None]]

PATCHES: dict[str, tuple[Patch, Callable[[], Any]]] = {
    "kernels_hidden": (patches.kernels_hidden, lambda: sys.modules.get("kernels", "not imported")),
    "compilation_postponed": (patches.compilation_postponed, lambda: torch.compile),
    "parameters_on_meta": (patches.parameters_on_meta, lambda: nn.Module.register_parameter),
    "fake_parameters_converted": (
        lambda: patches.fake_parameters_converted(is_fake),
        lambda: nn.Module._apply,
    ),
    "rows_packed": (
        lambda: patches.rows_packed(packed=False),
        lambda: masking_utils.find_packed_sequence_indices,
    ),
    "quantizer_replaced": (
        lambda: patches.quantizer_replaced("bitsandbytes_4bit", HfQuantizer),
        lambda: auto.AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"],
    ),
}
"""each patch with a function that returns the patched object"""


def public() -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(patches).items()
        if isinstance(value, FunctionType) and value.__module__ == patches.__name__ and name[0] != "_"
    }


def test_every_patch_is_tested_and_documents_its_reason() -> None:
    assert set(PATCHES) == set(public())
    for name, patch in public().items():
        text = inspect.getdoc(patch) or ""
        for line in (
            r"Changes: ",
            r"Needed by: \w+ \d+\.\d+",
            r"Source: https://github\.com/",
            r"Unnecessary once: ",
        ):
            assert re.search(rf"^{line}", text, re.MULTILINE), f"{name}: {line}"


@pytest.mark.parametrize("name", PATCHES)
def test_a_patch_is_undone(name: str) -> None:
    patch, changed = PATCHES[name]
    before = changed()
    with patch():
        assert changed() is not before
    assert changed() is before
    with pytest.raises(KeyError), patch():
        raise KeyError
    assert changed() is before


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("parameters_on_meta", ["self", "name", "param"]), ("rows_packed", ["position_ids"])],
)
def test_a_replaced_function_has_the_expected_parameters(name: str, parameters: list[str]) -> None:
    patch, changed = PATCHES[name]
    assert list(inspect.signature(changed()).parameters) == parameters
    with patch():
        assert list(inspect.signature(changed()).parameters) == parameters


def test_bitsandbytes_imports_kernels_as_expected() -> None:
    package = find_spec("bitsandbytes")
    assert package is not None
    source = (Path(str(package.origin)).parent / "backends/cpu/ops.py").read_text()
    assert "from kernels import get_kernel" in source
    assert f'"{patches.KERNELS_FAILED}' in source
    assert "logger = logging.getLogger(__name__)" in source


def test_transformers_detects_packed_rows_as_expected() -> None:
    assert "find_packed_sequence_indices(position_ids)" in inspect.getsource(
        masking_utils._preprocess_mask_arguments
    )


def test_transformers_prepares_4_bit_weights_as_expected() -> None:
    assert auto.AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] is Bnb4BitHfQuantizer
    prepare = Bnb4BitHfQuantizer._process_model_before_weight_loading
    assert list(inspect.signature(prepare).parameters)[:2] == ["self", "model"]


def test_a_postponed_function_is_compiled_once_with_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[dict[str, Any]] = []

    def compiled(function: Callable[[int], int], **settings: Any) -> Callable[[int], int]:
        log.append(settings)
        return lambda number: 10 * function(number)

    monkeypatch.setattr(torch, "compile", compiled)
    with patches.compilation_postponed():

        @torch.compile
        def plain(number: int) -> int:
            return number

        @torch.compile(dynamic=False)
        def fixed(number: int) -> int:
            return number

    assert not log
    assert [plain(1), plain(2), fixed(3)] == [10, 20, 30]
    assert log == [{}, {"dynamic": False}]
