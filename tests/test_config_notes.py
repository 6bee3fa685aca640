"""Remarks on a configuration: what its model asks for and a run does otherwise is said before the run."""

from pathlib import Path
from typing import Any

import architectures_for_tests as small
import pytest
from transformers import BartConfig

from qlora.errors import ModelError
from qlora.memory.estimate import estimate
from qlora.model.config_notes import config_notes
from qlora.model.load import load_config
from qlora.model.prepare import build, model_notes
from qlora.recipe import Base, Recipe


def recipe(max_length: int = 64, **adapter: Any) -> Recipe:
    return Recipe.from_dict(
        {
            "adapter": adapter,
            "data": {"source": "rows.jsonl", "max_length": max_length},
            "base": {"model": "x"},
        }
    )


def rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, **settings}


def test_a_load_balancing_loss_that_is_left_out_is_named() -> None:
    config = small.config("mixtral", output_router_logits=True, router_aux_loss_coef=0.5)
    (note,) = config_notes(recipe(), config)
    assert "output_router_logits=true" in note
    assert "router_aux_loss_coef=0.5" in note
    assert note.endswith("the routers are frozen")
    (note,) = config_notes(recipe(train_modules=["gate"]), config)
    assert "frozen" not in note
    for changes in ({"output_router_logits": False}, {"router_aux_loss_coef": 0.0}):
        asked = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
        assert config_notes(recipe(), small.config("mixtral", **(asked | changes))) == []


def test_positions_that_depend_on_other_rows_are_named_with_the_length_from_which_on() -> None:
    dynamic = small.config("llama", max_position_embeddings=32, rope_parameters=rope("dynamic"))
    (note,) = config_notes(recipe(max_length=33), dynamic)
    assert note.startswith("data.max_length=33: rope_type=dynamic")
    assert "more than 32 tokens" in note
    assert "beside and before it" in note
    assert config_notes(recipe(max_length=32), dynamic) == []
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    long = small.config(
        "phi3", original_max_position_embeddings=40, max_position_embeddings=256,
        rope_parameters=rope("longrope", **factors),
    )  # fmt: skip
    (note,) = config_notes(recipe(max_length=64), long)
    assert "more than 40 tokens" in note
    assert "before" not in note


def test_positions_of_each_kind_of_layer_are_read() -> None:
    config = small.config("gemma3_text")
    config.rope_parameters = {"sliding_attention": rope("default"), "full_attention": rope("dynamic")}
    (note,) = config_notes(recipe(max_length=512), config)
    assert "more than 256 tokens" in note


@pytest.mark.parametrize("kind", ["default", "yarn", "linear", "llama3"])
def test_positions_that_depend_on_nothing_else_are_not_named(kind: str) -> None:
    config = small.config("llama")
    config.rope_parameters = rope(kind, original_max_position_embeddings=32)
    assert config_notes(recipe(max_length=4096), config) == []


def test_an_encoder_and_decoder_is_refused_from_its_configuration(tmp_path: Path) -> None:
    BartConfig(d_model=64).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"base\.model: .*bart; is_encoder_decoder is true in its config"):
        load_config(Base(model=str(tmp_path)))


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "count"), [("gpt_neox", 1), ("phi3", 0)])
def test_an_estimate_and_a_run_name_layers_without_our_passes_once(
    tmp_path: Path, architecture: str, count: int
) -> None:
    made = small.recipe(tmp_path, architecture, layers=2, base={"compute_dtype": "float32"})
    model, _ = build(made, "cpu")
    for lines in (estimate(made).lines(), model_notes(model, None, made)):
        assert sum("run transformers' own code" in line for line in lines) == count
