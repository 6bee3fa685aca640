"""Adapters of mixtures with dense layers beside the experts: PEFT computes the same logits."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapters_for_tests import CONFIG
from architectures_for_tests import config
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, conversion_mapping

from qlora.adapter import LoraSpec, adapt, load_adapter, lora_layers, save_adapter
from qlora.adapter.algebra.compose import compress
from qlora.adapter.algebra.tensors import read, write
from qlora.adapter.methods import METHODS
from qlora.adapter.peft_parameters import MODEL_TYPES
from qlora.errors import ModelError
from qlora.recipe import Adapter

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern:RuntimeWarning"),
]

IDS = torch.arange(16)[None] * 5
DENSE = ["o_proj", "gate_proj", "up_proj", "down_proj"]
SETTINGS: dict[str, dict[str, Any]] = {
    "all layers": {},
    "experts of the same rank": {"expert_rank": 4},
    "ranks and alphas of their own": {
        "expert_rank": 3, "rank_pattern": {"layers.0.*gate_proj": 2}, "alpha_pattern": {"down_proj": 7},
    },
    "without gate_up_proj of the experts": {"targets": DENSE, "dropout": 0.1},
    "the first block": {"targets": ["o_proj", r"model\.layers\.0\.mlp(\.\w+)?\.(gate|up|down)_proj"], "dropout": 0.1},
}  # fmt: skip


class Base:
    """A small mixture with random weights, made anew from the same ones."""

    def __init__(self, architecture: str) -> None:
        torch.manual_seed(0)
        own = {} if architecture == "longcat_flash" else {"num_hidden_layers": 2}
        self.config = config(architecture, **own)
        self.weights = {name: tensor.clone() for name, tensor in self._build().state_dict().items()}
        generator = torch.Generator().manual_seed(1)
        for tensor in self.weights.values():
            if tensor.ndim > 1:
                tensor.normal_(0, 0.1, generator=generator)

    def _build(self) -> Any:
        return AutoModelForCausalLM.from_config(self.config, dtype=torch.float32).eval()

    def __call__(self) -> Any:
        model = self._build()
        model.load_state_dict(self.weights)
        return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        result: Tensor = model.eval()(IDS).logits
    return result


def filled(model: nn.Module) -> nn.Module:
    """Give A and B of all layers random numbers."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            for parameter in (layer.lora_a, layer.lora_b):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def differences(base: Base, folder: Path, expected: Tensor) -> list[float]:
    """Return how far PEFT and qlora are from the expected logits, as shares of what the adapter changes."""
    effect = (expected - logits(base())).abs().max()
    assert effect > 0.1
    theirs = logits(peft.PeftModel.from_pretrained(base(), folder))
    ours = logits(load_adapter(base(), folder, any_base=True))
    return [((found - expected).abs().max() / effect).item() for found in (theirs, ours)]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("architecture", ["glm4_moe", "afmoe"])
def test_peft_computes_the_same_logits(architecture: str, settings: dict[str, Any], tmp_path: Path) -> None:
    _check(architecture, settings, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize(
    "architecture",
    ["deepseek_v2", "deepseek_v3", "hunyuan_v1_moe", "qwen3_next", "exaone_moe", "glm_moe_dsa"],
)
def test_peft_computes_the_same_logits_of_others(
    architecture: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    _check(architecture, settings, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture",
    ["qwen2_moe", "olmoe", "granitemoe", "granitemoeshared", "phimoe", "minimax_m2", "jamba", "lfm2_moe",
     "qwen3_5_moe_text", "flex_olmo"],
)  # fmt: skip
def test_peft_computes_the_same_logits_of_adapters_on_all_layers(architecture: str, tmp_path: Path) -> None:
    _check(architecture, {}, tmp_path)


@pytest.mark.slow
def test_peft_computes_the_same_logits_of_experts_that_return_their_input(tmp_path: Path) -> None:
    """LongCat's gate and up have matrices for these too, which a wrong rank would look like to `qlora adapter`."""
    base = Base("longcat_flash")
    model = filled(adapt(base(), LoraSpec(rank=4, alpha=6, dtype=torch.float32)))
    save_adapter(model, tmp_path / "saved")
    assert max(differences(base, tmp_path / "saved", logits(model))) < 1e-5
    with pytest.raises(ModelError, match="adapters of LongCat"):
        read(tmp_path / "saved")


def _check(architecture: str, settings: dict[str, Any], folder: Path) -> None:
    base = Base(architecture)
    model = filled(adapt(base(), LoraSpec(**{"rank": 4, "alpha": 6, "dtype": torch.float32} | settings)))
    save_adapter(model, folder / "saved")
    assert max(differences(base, folder / "saved", logits(model))) < 1e-5
    small, _ = compress(read(folder / "saved"), rank=2)
    write(small, folder / "small")
    reference = logits(load_adapter(base(), folder / "small", any_base=True))
    assert max(differences(base, folder / "small", reference)) < 1e-5


def test_the_list_has_each_model_that_peft_takes_for_one_of_these() -> None:
    known = conversion_mapping._MODEL_TO_CONVERSION_PATTERN
    assert {
        name for name, like in known.items() if like == "qwen2_moe" and name == name.lower()
    } <= MODEL_TYPES


def test_dense_layers_are_parameters_only_where_peft_takes_them_for_experts(tmp_path: Path) -> None:
    expected = {
        "llama": None,
        "qwen2_moe": ["experts.down_proj"],
        "glm4_moe": ["experts.down_proj", "down_proj.weight", "gate_proj.weight", "up_proj.weight"],
    }
    for architecture, parameters in expected.items():
        save_adapter(adapt(Base(architecture)(), LoraSpec(rank=2, targets=DENSE)), tmp_path / architecture)
        written = json.loads((tmp_path / architecture / CONFIG).read_text())
        assert written.get("target_parameters") == parameters
        assert set(written["target_modules"]) == ({"o_proj"} if architecture == "glm4_moe" else set(DENSE))


@pytest.mark.parametrize(
    "entries", [["up_proj.weight"], ["model.layers.1.mlp.up_proj.weight", "q_proj.weight"]]
)
def test_an_adapter_of_peft_for_weights_of_linear_layers_is_read(
    entries: Sequence[str], tmp_path: Path
) -> None:
    base = Base("llama")
    settings = peft.LoraConfig(
        r=4, target_modules=["v_proj"], target_parameters=list(entries), task_type="CAUSAL_LM",
        rank_pattern={"up_proj.weight": 3}, alpha_pattern={"up_proj": 99},
    )  # fmt: skip
    theirs = peft.get_peft_model(base(), settings)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.2, generator=generator)
    theirs.save_pretrained(tmp_path)
    assert max(differences(base, tmp_path, logits(theirs))) < 1e-5
    assert {layer.rank for layer in read(tmp_path).layers.values()} == {3, 4}


def test_only_dora_is_refused_by_peft_and_says_so() -> None:
    for method in ("lora", "dora", "adalora", "vera"):
        model = METHODS[method].apply(
            Base("glm4_moe")(), Adapter(method=method, rank=2, targets=DENSE), seed=0
        )
        said = [note for note in METHODS[method].notes(model) if "PEFT 0.21 refuses this adapter" in note]
        assert bool(said) == (method == "dora")
    assert "layers.0.mlp.gate_proj" in said[0] if said else True


def test_an_adapter_of_the_experts_of_one_layer_is_loaded_again(tmp_path: Path) -> None:
    base = Base("qwen3_moe")
    for number, targets in enumerate(
        (["model.layers.1.mlp.experts.down_proj"], [r"model\.layers\.0\..*_proj"])
    ):
        model = filled(adapt(base(), LoraSpec(rank=4, targets=targets, dtype=torch.float32)))
        save_adapter(model, tmp_path / str(number))
        assert max(differences(base, tmp_path / str(number), logits(model))) < 1e-5
