"""A run that began in one compute dtype does not go on in another unnoticed, as `auto` would on another machine."""

from collections.abc import Callable
from pathlib import Path

import pytest

from qlora.errors import RecipeError
from qlora.model import load
from qlora.recipe import Recipe
from qlora.training.train import train

RecipeFile = Callable[..., Path]


@pytest.mark.usefixtures("without_forecast")
def test_auto_of_another_machine_is_refused_and_the_first_dtype_can_be_named(
    recipe_file: RecipeFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = recipe_file(base={"compute_dtype": "auto"}, training={"save_every": 2, "max_steps": 3})
    monkeypatch.setattr(load, "multiplies_bfloat16", lambda: True)
    done = train(Recipe.load(file), terminal=False)
    assert done.result is not None
    whole = (done.result / "adapter_model.safetensors").read_bytes()
    (done.run / "result.json").unlink()
    monkeypatch.setattr(load, "multiplies_bfloat16", lambda: False)
    with pytest.raises(
        RecipeError, match=r"began in bfloat16 and would go on in float32.* with base\.compute_dtype=bfloat16"
    ):
        train(Recipe.load(file), resume=True, terminal=False)
    train(Recipe.load(file, ["base.compute_dtype=bfloat16"]), resume=True, terminal=False)
    assert (done.result / "adapter_model.safetensors").read_bytes() == whole
