"""Each error class has an exit code that shows what the user must change."""

from types import SimpleNamespace

import pytest
import torch

from qlora import errors
from qlora.errors import QloraError, RecipeError, UsageError
from qlora.recipe import Recipe
from qlora.runtime.device import device_named
from qlora.runtime.distributed import DataParallel


def test_only_recipes_and_usage_share_an_exit_code() -> None:
    classes = [kind for kind in vars(errors).values() if isinstance(kind, type) and kind is not QloraError]
    codes = [kind.exit_code for kind in classes]
    shared = {kind.__name__ for kind in classes if codes.count(kind.exit_code) > 1}
    assert shared == {"RecipeError", "UsageError", "FunctionError"}


def test_a_missing_gpu_is_not_a_model_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert device_named("auto") == device_named("cpu")
    with pytest.raises(UsageError, match="no CUDA device; leave out --device"):
        device_named("cuda")
    cpu = SimpleNamespace(device=torch.device("cpu"))
    monkeypatch.setattr("qlora.runtime.distributed.Accelerator", lambda **_: cpu)
    with pytest.raises(RecipeError, match=r"training\.device: is cuda, but"):
        DataParallel.of(Recipe.load("quickstart", ["training.device=cuda"]))


def test_a_name_that_would_not_be_seen_is_quoted_in_a_list() -> None:
    assert errors.listed(["a", " b", "", "d", "e"], most=3) == "a, ' b', '' and 2 more"
