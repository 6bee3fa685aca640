"""Remarks on a configuration: what its model asks for and a run does otherwise is said before the run."""

from pathlib import Path
from typing import Any

import architectures_for_tests as small
import pytest
from transformers import BartConfig

from qlora.errors import ModelError, RecipeError
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


def router_notes(kind: str, setting: str | float = "auto", **changes: Any) -> list[str]:
    made = recipe()
    training = made.training.model_copy(update={"router_loss": setting})
    return config_notes(made.model_copy(update={"training": training}), small.config(kind, **changes))


def test_the_coefficient_of_the_load_balancing_loss_is_said_with_its_source() -> None:
    (note,) = router_notes("mixtral", output_router_logits=True, router_aux_loss_coef=0.5)
    assert note == (
        "the loss is the cross-entropy plus 0.5 times the load-balancing loss of the routers (aux_loss): "
        "training.router_loss=auto follows output_router_logits=true and router_aux_loss_coef=0.5 in config.json. "
        "Held-out losses are without it"
    )
    (note,) = router_notes("jetmoe", output_router_logits=True)
    assert "plus 0.01 times" in note
    assert "aux_loss_coef=0.01 in config.json" in note
    (note,) = router_notes("dbrx", 0.25)
    assert note.endswith("(aux_loss): training.router_loss=0.25. Held-out losses are without it")
    assert "plus 0.25 times" in note


def test_a_load_balancing_loss_that_is_left_out_is_named() -> None:
    (note,) = router_notes("dbrx", ffn_config={"moe_loss_weight": 0.5})
    assert note == (
        "the loss is the cross-entropy alone: config.json has ffn_config.moe_loss_weight=0.5 but does not set "
        "output_router_logits, so it asks for no load-balancing loss. training.router_loss=0.5 adds it"
    )
    (note,) = router_notes("mixtral", "off", output_router_logits=True, router_aux_loss_coef=0.5)
    assert "router_aux_loss_coef=0.5 in config.json ask for, as training.router_loss=off says" in note
    (note,) = router_notes("doge")
    assert note.endswith("so it asks for no load-balancing loss"), "qlora does not compute that of Doge"
    for kind in ("llama4_text", "deepseek_v3"):
        (note,) = router_notes(kind, output_router_logits=True)
        assert note.endswith(f"transformers computes no load-balancing loss for {kind}")
        assert router_notes(kind) == []
    assert router_notes("olmoe", "off") == router_notes("olmoe", router_aux_loss_coef=0.0) == []
    assert router_notes("olmoe", router_aux_loss_coef=0.0, output_router_logits=True) == []


def test_a_coefficient_for_a_model_without_the_loss_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"^training\.router_loss: transformers computes no .* for llama\."):
        router_notes("llama", 0.5)


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
