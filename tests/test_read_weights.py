"""Layers whose weight the model's code reads: neither quantized nor adapted, and named."""

from pathlib import Path

import pytest
import torch
from architectures_for_tests import config, recipe
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qlora.adapter.targets import select
from qlora.data import Batch
from qlora.errors import ModelError
from qlora.model.precision import READ, precision_of
from qlora.model.prepare import build, left_out_notes
from qlora.objective.causal_lm import loss_sum
from qlora.quantization.nf4 import is_nf4
from qlora.quantization.read_weights import read_layers
from qlora.quantization.transformers_loader import nf4_layers, skipped_modules

READ_LEAVES = {
    "bamba": {"out_proj"},
    "falcon_h1": {"out_proj"},
    "granitemoehybrid": {"out_proj"},
    "nemotron_h": {"out_proj"},
    "zamba2": {"out_proj"},
    "mamba": {"out_proj", "x_proj", "dt_proj", "lm_head"},
    "falcon_mamba": {"out_proj", "x_proj", "dt_proj", "lm_head"},
    "mamba2": {"out_proj", "lm_head"},
    "jamba": {"dt_proj"},
    "hunyuan_v1_moe": {"wg"},
    "rwkv": {"output", "value"},
    "gemma3n_text": {"prediction_coefs", "correction_coefs"},
    "xlstm": {"lm_head"},
    "llama": set(),
    "bloom": set(),
    "qwen3_5_text": set(),
}


def meta(architecture: str) -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config(architecture))


@pytest.mark.parametrize("architecture", READ_LEAVES)
def test_layers_whose_weight_is_read_are_neither_adapted_nor_quantized(architecture: str) -> None:
    model = meta(architecture)
    read = read_layers(model)
    assert {name.rpartition(".")[2] for name in read} == READ_LEAVES[architecture]
    assert not read & set(select(model, "all-linear"))
    assert not read & set(nf4_layers(model))
    assert read <= set(skipped_modules(model) or ())
    if architecture == "rwkv":  # a layer of the same name, which is called
        assert "rwkv.blocks.0.attention.value" in select(model, "all-linear")


def test_a_target_that_is_only_read_is_an_error_that_names_it() -> None:
    model = meta("mamba")
    with pytest.raises(
        ModelError, match=r'"dt_proj": .* reads the weights of backbone.layers.0.mixer.dt_proj'
    ):
        select(model, ["in_proj", "dt_proj"])
    assert select(model, [".*layers.0.*_proj"]) == ["backbone.layers.0.mixer.in_proj"]


class Mixed(nn.Module):
    """Reads a weight in a branch that no test runs, and others in methods that no forward pass reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read, self.inner = (
            nn.Linear(4, 4),
            nn.Linear(4, 4),
            nn.ModuleList([nn.Linear(4, 4)]),
        )
        self.init_values()

    def init_values(self) -> None:
        self.called.weight.data.zero_()

    def fuse_projections(self) -> Tensor:  # as diffusers' attention has it
        return torch.cat([self.called.weight, self.inner[0].weight])

    def fused(self, x: Tensor) -> Tensor:
        return x @ self.read.weight.T

    def forward(self, x: Tensor) -> Tensor:
        scales = [self.fused(x) for _ in range(x.is_cuda)]
        return sum(scales, self.called(x))


def test_a_read_in_a_branch_counts_and_one_that_no_forward_pass_reaches_does_not() -> None:
    model = nn.ModuleDict({"a": Mixed()})
    assert read_layers(model) == {"a.read"}
    assert select(model, "all-linear") == ["a.called", "a.inner.0"]


@pytest.mark.parametrize("architecture", ["bamba", "gemma3n_text"])
def test_a_model_that_reads_weights_is_trained_over_nf4(architecture: str, tmp_path: Path) -> None:
    settings = recipe(tmp_path, architecture, layers=2)
    model, _ = build(settings, "cpu")
    ids = torch.tensor([[5, 6, 7, 8]])
    loss_sum(model, Batch(ids, ids.clone(), position_ids=None, tokens=4, supervised=3)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    read = read_layers(model)
    assert not any(is_nf4(model.get_submodule(name)) for name in read)
    assert precision_of(model).kept[READ] == sum(model.get_submodule(name).weight.numel() for name in read)
    (note,) = left_out_notes(model, settings.adapter.targets)
    assert sorted(read)[0] in note
    assert not left_out_notes(model, ["q_proj"])
    (note,) = left_out_notes(model, [".*"])  # a list that matches such layers beside others
    assert sorted(read)[0] in note
