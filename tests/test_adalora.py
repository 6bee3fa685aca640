"""AdaLoRA equals PEFT in its output and its allocation, starts as the base, and its runs support what LoRA's do."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures_for_tests import recipe
from methods_for_tests import (
    IDS,
    TARGETS,
    adapted,
    assert_merges,
    assert_resumes,
    assert_saved_and_loaded,
    logits,
    optimizer_over,
    tiny,
)
from methods_for_tests import train as take_steps
from test_memory_forecast import assert_right, foreseen, measured
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from qlora.adapter import load_adapter, save_adapter, trainable_parameters
from qlora.adapter.methods import METHODS
from qlora.adapter.methods.adalora import AdaloraLinear, AdaloraSpec
from qlora.adapter.methods.rank_allocation import RankAllocation, Schedule
from qlora.errors import ModelError, RecipeError
from qlora.memory import advice
from qlora.memory.workload import assumed
from qlora.model.prepare import build_optimizer
from qlora.recipe import Adapter, Recipe
from qlora.recipe.methods import METHODS as FACTS
from qlora.training import train as loop
from qlora.training.train import train

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    # What PEFT says of every pruned adapter, also of its own
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:.*LoRA tensor.s. have invalid shape"),
]
RecipeFile = Callable[..., Path]


def course_of(model: nn.Module, steps: int, **settings: Any) -> RankAllocation:
    course = METHODS["adalora"].course(model, Adapter(method="adalora", **settings), steps)
    assert isinstance(course, RankAllocation)
    return course


def pruned(model: nn.Module) -> nn.Module:
    """Remove every third triplet of all layers, and all of one layer."""
    for name, layer in AdaloraLinear.of(model).items():
        layer.prune((torch.arange(layer.rank) % 3 > 0) & ("0.self_attn.k_proj" not in name))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantized", [False, True])
def test_it_starts_as_the_base_and_learns_singular_values_first(
    tiny_llama: Path, dtype: torch.dtype, quantized: bool
) -> None:
    plain = tiny(tiny_llama, dtype, quantized=quantized)
    model = adapted(tiny(tiny_llama, dtype, quantized=quantized), "adalora", rank=5)
    assert torch.equal(logits(model), logits(plain))
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    for name, parameter in trainable_parameters(model).items():
        assert parameter.grad is not None
        assert parameter.grad.any() == name.endswith("lora_e"), name
    layer = AdaloraLinear.of(model)["model.layers.0.mlp.up_proj"]
    assert layer.rank == 8, "1.5 times the rank, rounded up"


def test_gradients_equal_those_of_autograd_in_fp64() -> None:
    linear = nn.Linear(7, 5).double()
    layer = AdaloraLinear(linear, AdaloraSpec(3, alpha=2.0, dtype=torch.float64))
    nn.init.normal_(layer.lora_e)
    x, weights = torch.randn(2, 6, 7, dtype=torch.float64), torch.randn(2, 6, 5, dtype=torch.float64)
    a, b, e = (p.detach().clone().requires_grad_() for p in (layer.lora_a, layer.lora_b, layer.lora_e))
    reference = linear(x) + 2 / (3 + 1e-5) * x @ a.T @ torch.diag(e.view(-1)) @ b.T
    torch.testing.assert_close(layer(x), reference, rtol=1e-12, atol=1e-12)
    for output in (layer(x), reference):
        (output.tanh() * weights).sum().backward()
    for own, other in ((layer.lora_a, a), (layer.lora_b, b), (layer.lora_e, e)):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("quantized", "dtype"), [(False, torch.float32), (True, torch.float32), (True, torch.bfloat16)]
)
@pytest.mark.parametrize("prune", [False, True])
def test_peft_computes_the_same_with_our_adapter(
    tiny_llama: Path, tmp_path: Path, quantized: bool, dtype: torch.dtype, prune: bool
) -> None:
    model = adapted(tiny(tiny_llama, dtype, quantized=quantized), "adalora", 0.2, rank=4, alpha=3.0)
    model = pruned(model) if prune else model
    fields = assert_saved_and_loaded(model, tiny(tiny_llama, dtype, quantized=quantized), tmp_path)
    assert fields.keys() <= peft.AdaLoraConfig(total_step=1).to_dict().keys()
    assert bool(fields["rank_pattern"]) == prune
    plain = tiny(tiny_llama, dtype, quantized=quantized)
    effect = (logits(model) - logits(plain)).abs().max()
    theirs = logits(peft.PeftModel.from_pretrained(plain, tmp_path))
    assert effect > 0.05
    assert (theirs - logits(model)).abs().max() < (1e-4 if dtype == torch.float32 else 0.2) * effect


def allocated_by_peft(folder: Path, steps: int) -> nn.Module:
    """Return a model of PEFT after steps of SGD with its own allocation of ranks."""
    config = peft.AdaLoraConfig(
        init_r=6, target_r=4, tinit=1, tfinal=3, deltaT=2, total_step=steps, target_modules=TARGETS,
        task_type="CAUSAL_LM", lora_alpha=6, orth_reg_weight=0.3,
    )  # fmt: skip
    model = peft.get_peft_model(tiny(folder), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_E" in name:
                parameter.normal_()
    return model


def test_the_allocation_is_that_of_peft_on_the_same_gradients(tiny_llama: Path, tmp_path: Path) -> None:
    steps = 10
    theirs = allocated_by_peft(tiny_llama, steps)
    layers = {
        name: (m.lora_A["default"], m.lora_B["default"], m.lora_E["default"])
        for name, m in theirs.base_model.model.named_modules()
        if type(m).__name__ == "SVDLinear"
    }
    base = tiny(tiny_llama)
    METHODS["adalora"].apply(base, Adapter(method="adalora", targets="all-linear", rank=4), seed=0)
    own = AdaloraLinear.of(base.float())
    for name, parts in layers.items():
        for part, tensor in zip(("lora_a", "lora_b", "lora_e"), parts, strict=True):
            setattr(own[name], part, nn.Parameter(tensor.detach().clone()))
    course = RankAllocation(own, Schedule(1, steps - 3, 2, 6 * len(own), 4 * len(own)), 0.3, (0.85, 0.85))
    for step in range(steps):
        theirs.zero_grad()
        theirs(input_ids=IDS, labels=IDS).loss.backward()  # with their penalty
        base.zero_grad()
        (base(input_ids=IDS, labels=IDS).loss + course.penalty()).backward()
        for model in (theirs, base):
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter.sub_(0.3 * parameter.grad)
        theirs.base_model.update_and_allocate(step + 1)
        course.after_step(step)
        if step < steps - 1:
            for name, parts in layers.items():
                for part, tensor in zip(("lora_a", "lora_b", "lora_e"), parts, strict=True):
                    torch.testing.assert_close(getattr(own[name], part), tensor, rtol=1e-3, atol=1e-5)
    course.finish()
    pattern = {
        name.removesuffix(".lora_E.default"): kept
        for name, kept in theirs.peft_config["default"].rank_pattern.items()
    }
    assert {name: list(layer.spec.kept) for name, layer in own.items()} == pattern
    assert sum(layer.rank for layer in own.values()) == 4 * len(own)
    assert len({layer.rank for layer in own.values()}) > 2
    theirs.save_pretrained(tmp_path)
    loaded = load_adapter(tiny(tiny_llama), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(base), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(logits(loaded), logits(theirs), rtol=1e-4, atol=1e-5)


def test_the_budget_falls_with_the_cube_of_the_time_left() -> None:
    schedule = Schedule(start=10, end=60, every=5, first=120, last=80)
    budgets = {step: schedule.budget(step) for step in range(1, 101)}
    assert {step for step, budget in budgets.items() if budget is not None} == {*range(15, 60, 5), 60}
    assert budgets[35] == int(40 * 0.5**3 + 80)
    assert budgets[60] == 80


def test_a_run_that_is_resumed_at_its_end_gets_its_ranks(tiny_llama: Path) -> None:
    settings = {"rank": 4, "budget": {"every": 1}}
    model = adapted(tiny(tiny_llama), "adalora", 0.1, **settings)
    before, after = course_of(model, 20, **settings), course_of(model, 7, **settings)
    take_steps(model, optimizer_over(model), range(7), 1e-2, before)
    after.load_state(before.state())
    kept = {name: layer.lora_e[after.kept[name]] for name, layer in AdaloraLinear.of(model).items()}
    assert sum(map(len, kept.values())) > 4 * len(kept)
    after.finish()
    ranks = {name: layer.rank for name, layer in AdaloraLinear.of(model).items()}
    assert after.outcome()["ranks"] == ranks
    assert sum(ranks.values()) == 4 * len(ranks)
    assert len(set(ranks.values())) > 1


def test_gradients_of_the_penalty_are_added_in_fp32(tmp_path: Path) -> None:
    def dtypes(orthogonality: float) -> set[torch.dtype]:
        adapter = {"method": "adalora", "budget": {"orthogonality": orthogonality}}
        made = recipe(
            tmp_path, "llama", adapter=adapter, training={"global_batch_size": 1, "micro_batch_size": 1}
        )
        model = adapted(nn.ModuleDict({"a": nn.Linear(4, 4)}), "adalora")
        return {gradient.dtype for gradient in build_optimizer(model, made).gradients()}

    assert dtypes(0.1) == {torch.float32}
    assert dtypes(0.0) == {torch.bfloat16, torch.float32}, "nothing is added to the gradients of A and B"


def test_a_merged_model_computes_the_same(tiny_llama: Path) -> None:
    for quantized in (False, True):
        model = pruned(adapted(tiny(tiny_llama, quantized=quantized), "adalora", 0.3))
        assert_merges(model, tiny(tiny_llama, quantized=quantized))


def test_a_conv1d_gets_triplets() -> None:
    layer = AdaloraLinear(Conv1D(5, 7), AdaloraSpec(3))
    with torch.no_grad():
        for parameter in (layer.lora_a, layer.lora_b, layer.lora_e):
            parameter.normal_()
    x = torch.randn(3, 7)
    wanted = F.linear(x, layer.merged_weight(), layer.base.bias)
    assert (wanted - layer.base(x)).abs().max() > 0.01
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stop", [3, 8])
def test_training_resumes_bit_for_bit(tiny_llama: Path, tmp_path: Path, stop: int) -> None:
    settings = {"rank": 4, "dropout": 0.1, "budget": {"every": 1, "orthogonality": 0.5}}
    model = assert_resumes(
        lambda: adapted(tiny(tiny_llama), "adalora", 0.1, **settings),
        tmp_path,
        steps=10,
        stop=stop,
        course=lambda model, steps: course_of(model, steps, **settings),
    )
    ranks = [layer.rank for layer in AdaloraLinear.of(model).values()]
    assert sum(ranks) == 4 * len(ranks)
    assert len(set(ranks)) > 1


def test_its_memory_is_forecast_with_its_averages(tmp_path: Path) -> None:
    made = recipe(
        tmp_path,
        "llama",
        layers=4,
        adapter={"method": "adalora", "targets": "all-linear"},
        data={"held_out": 0},
    )
    assert_right(foreseen(made, assumed(made)), measured(made, assumed(made)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank_pattern": {"a": [1, 0]}}, "rank_pattern of a must be a list of true and false"),
        ({"init_r": 0}, "init_r must be a whole number of at least 1"),
        (
            {"use_dora": True},
            r"use_dora = true is not supported \(.* DoRA\)\. Use an adapter that was trained without it",
        ),
        ({"lora_alpha": 0}, "lora_alpha must be a number above 0"),
    ],
)
def test_a_damaged_config_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4)})
    save_adapter(adapted(model, "adalora"), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ModelError, match=message):
        load_adapter(nn.ModuleDict({"a": nn.Linear(4, 4)}), tmp_path, any_base=True)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"rank": 9, "budget": {"initial_rank": 8}}, r"initial_rank: must be at least adapter\.rank \(9\)"),
        (
            {"budget": {"start": 0.5, "final": 0.5}},
            r"final: start \(0\.5\) and final \(0\.5\) must be below 1",
        ),
        ({"init": "gaussian"}, r"adapter\.init: has no effect with adapter\.method: adalora"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(adapter: dict[str, Any], message: str) -> None:
    settings = {"base": {"model": "bundled/base"}, "data": {"source": "a.jsonl"}}
    with pytest.raises(RecipeError, match=message):
        Recipe.from_dict({**settings, "adapter": {"method": "adalora", **adapter}})


def test_a_smaller_rank_keeps_the_proportion_of_a_given_first_rank() -> None:
    settings = {"base": {"model": "bundled/base"}, "data": {"source": "a.jsonl"}}
    adapter: dict[str, Any] = {"method": "adalora", "rank": 32, "alpha": 8}
    for budget, extra, first in (({}, "", 24), ({"initial_rank": 50}, " adapter.budget.initial_rank=25", 25)):
        made = Recipe.from_dict({**settings, "adapter": {**adapter, "budget": budget}})
        changed, setting = next(advice._rank(made, Any))
        assert setting == f"adapter.rank=16 adapter.alpha=4{extra}"
        assert changed.adapter.initial_rank == first


def test_the_rules_of_the_budget_are_those_of_a_method_that_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FACTS, "dora", replace(FACTS["dora"], unused=()))
    with pytest.raises(RecipeError, match=r"initial_rank: must be at least adapter\.rank \(9\)"):
        Recipe.load("quickstart", ["adapter.method=dora", "adapter.rank=9", "adapter.budget.initial_rank=8"])


@pytest.mark.slow
def test_a_stopped_run_ends_with_the_same_ranks_and_adapter(
    recipe_file: RecipeFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = recipe_file(training={"max_steps": 8, "save_every": 2}, optimizer={"lr": 1e-2})
    adapter = {"method": "adalora", "rank": 4, "targets": "all-linear", "budget": {"every": 1}}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"adapter": adapter}))
    whole = train(Recipe.load(file, [f"output={tmp_path / 'whole'}"]), terminal=False)
    update = loop.update

    def interrupted(session: Any, batches: Any, step: int, lr: float) -> dict[str, float]:
        if step == 5:
            raise InterruptedError
        return update(session, batches, step, lr)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "update", interrupted)
        with pytest.raises(InterruptedError):
            train(Recipe.load(file), terminal=False)
    resumed = train(Recipe.load(file), resume=True, terminal=False)
    assert resumed.adapter == whole.adapter
    assert sum(whole.adapter["ranks"].values()) == 4 * len(whole.adapter["ranks"])
    name = "adapter/adapter_model.safetensors"
    assert (resumed.run / name).read_bytes() == (whole.run / name).read_bytes()
