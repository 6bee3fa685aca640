"""LoRA+: B learns at another rate than A, as with torch's parameter groups; forecast, header and resume know it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from architectures_for_tests import recipe
from runs_for_tests import killed_and_resumed
from test_memory_forecast import assert_right, foreseen, measured
from torch import Tensor, nn

from qlora.adapter import LoraSpec, adapt, trainable_parameters
from qlora.errors import ModelError
from qlora.memory.workload import assumed
from qlora.model.prepare import build_optimizer, lr_factors
from qlora.optim import Optimizer
from qlora.recipe import Recipe
from qlora.training.train import train

RATIO = 16.0


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    return adapt(layers, LoraSpec(rank=2, targets="all-linear", dtype=torch.float32))


def add_gradients(model: nn.Module, x: Tensor) -> None:
    model(x).square().sum().backward()


def ratio_of(made: Recipe, ratio: float) -> Recipe:
    return made.model_copy(update={"adapter": made.adapter.model_copy(update={"lr_ratio": ratio})})


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_steps_equal_those_of_torch_with_a_group_for_a_and_one_for_b(weight_decay: float) -> None:
    made = Recipe.load("quickstart", ["adapter.lr_ratio=16", f"optimizer.weight_decay={weight_decay}"])
    ours, theirs = network(), network()
    optimizer = build_optimizer(ours, made)
    of_a, of_b = (
        [p for name, p in trainable_parameters(theirs).items() if name.endswith(end)] for end in ("_a", "_b")
    )
    reference = torch.optim.AdamW(
        [{"params": of_a, "lr": 1e-3}, {"params": of_b, "lr": 1e-3 * RATIO}], weight_decay=weight_decay
    )
    for step in range(3):
        x = torch.randn(7, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        reference.zero_grad()
        add_gradients(ours, x)
        add_gradients(theirs, x)
        optimizer.step(lr=1e-3)
        reference.step()
    for name, parameter in trainable_parameters(theirs).items():
        torch.testing.assert_close(dict(ours.named_parameters())[name], parameter, rtol=1e-5, atol=1e-7)


def test_the_groups_differ_in_nothing_else() -> None:
    model = network()
    made = ratio_of(Recipe.load("quickstart"), 4.0)
    assert set(lr_factors(model, made).values()) == {1.0, 4.0}
    assert set(lr_factors(model, ratio_of(made, 1.0)).values()) == {1.0}
    optimizer = Optimizer(trainable_parameters(model), name="adamw", lr_factors=lr_factors(model, made))
    saved = {key: value.clone() for key, value in optimizer.state().items()}
    again = Optimizer(
        trainable_parameters(network()), name="adamw"
    )  # the state has the same names in one group
    again.load_state(saved)
    with pytest.raises(ModelError, match="does not fit this run"):
        again.load_state({key: value for key, value in saved.items() if "lora_b" not in key})


@pytest.mark.slow
def test_its_memory_is_forecast(tmp_path: Path) -> None:
    made = recipe(tmp_path, "llama", layers=7, adapter={"lr_ratio": RATIO})
    assert_right(foreseen(made, assumed(made)), measured(made, assumed(made)))


@pytest.mark.slow
def test_the_header_names_both_rates_and_a_resumed_run_ends_with_the_same_adapter(
    recipe_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = recipe_file(adapter={"lr_ratio": RATIO}, training={"save_every": 2}, optimizer={"lr": 1e-3})
    whole = train(Recipe.load(file, [f"output={tmp_path / 'whole'}"]), terminal=False)
    steps = json.loads((whole.run / "facts.json").read_text())["steps"]
    assert steps["lr"] * steps["lr_ratio"] == pytest.approx(0.016)
    assert "0.001 for A and 0.016 for B" in (whole.run / "report.html").read_text()
    resumed = killed_and_resumed(Recipe.load(file), 3, monkeypatch)
    name = "adapter/adapter_model.safetensors"
    assert (resumed / name).read_bytes() == (whole.run / name).read_bytes()
