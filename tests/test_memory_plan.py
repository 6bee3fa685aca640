"""Memory plans for a budget, and the advised changes if a run does not fit."""

import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from architectures_for_tests import recipe
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora.data import load_dataset, training_batches
from qlora.errors import OutOfMemoryError, RecipeError
from qlora.memory.advice import MOST_FORECASTS, about_largest
from qlora.memory.architecture import architecture
from qlora.memory.estimate import estimate
from qlora.memory.forecast import Forecaster, forecast
from qlora.memory.parts import PARTS
from qlora.memory.plan import DEQUANTIZATION_TOKENS, Plan, Policy, needed, plan, sized
from qlora.memory.plan import changed as with_training
from qlora.memory.run_memory import RunMemory
from qlora.memory.workload import assumed
from qlora.model.load import load_tokenizer
from qlora.recipe import Recipe
from qlora.training.profile import profile
from qlora.training.train import train

RecipeFile = Callable[..., Path]
MIB = 2**20
LAYERS = 4
FORECASTERS: dict[str, Forecaster] = {}
PLANNED = Recipe.load("llama-7b", ["training.global_batch_size=8", "training.micro_batch_size=1"])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("made")
    return recipe(folder, "llama", layers=LAYERS, training={"global_batch_size": 4, "micro_batch_size": 1})


def planned(recipe: Recipe, budget: int) -> Plan:
    workload = assumed(recipe)
    return plan(recipe, lambda changed: sized(changed, workload), budget, forecaster_of(recipe))


def takes(recipe: Recipe) -> int:
    return needed(forecaster_of(recipe).forecast(recipe, assumed(recipe)))


def forecaster_of(recipe: Recipe) -> Forecaster:
    """Return one forecaster a base and adapter; `test_memory_forecast` holds that it equals separate forecasts."""
    key = recipe.base.model_dump_json() + recipe.adapter.model_dump_json()
    if key not in FORECASTERS:
        FORECASTERS[key] = Forecaster(architecture(recipe, cuda=False), cuda=False)
    return FORECASTERS[key]


def test_a_plan_fits_and_uses_its_budget(made: Recipe) -> None:
    smallest = takes(with_training(made, loss_chunk=256))
    low, middle, high = (planned(made, budget) for budget in (smallest, 4 * MIB, 100 * MIB))
    for found in (low, middle, high):
        assert takes(found.apply(made)) == found.needed_bytes <= found.budget_bytes
    assert low.micro_batch_size == 1
    assert low.checkpointed_layers + low.checkpointed_mlps == LAYERS
    assert (high.micro_batch_size, high.checkpointed_layers, high.checkpointed_mlps) == (4, 0, 0)


@pytest.mark.parametrize("share", [pytest.param(0.15, marks=pytest.mark.slow), 0.6])
def test_a_plan_recomputes_no_more_than_it_must(made: Recipe, share: float) -> None:
    """MLPs are recomputed before whole layers, and recomputing one part less would not fit."""
    made = with_training(made, global_batch_size=1)
    least, most = (
        takes(with_training(made, activation_checkpointing={"full": layers})) for layers in (LAYERS, 0)
    )
    found = planned(made, int(least + share * (most - least)))
    whole, mlps = found.checkpointed_layers, found.checkpointed_mlps
    assert takes(found.apply(made)) == found.needed_bytes <= found.budget_bytes
    assert mlps > 0
    assert whole == 0 or whole + mlps == LAYERS
    fewer = (whole - 1, mlps + 1) if whole else (0, mlps - 1)
    spared = with_training(found.apply(made), activation_checkpointing={"full": fewer[0], "mlp": fewer[1]})
    assert takes(spared) > found.budget_bytes


@pytest.mark.parametrize("level", [LAYERS, pytest.param(LAYERS + 2, marks=pytest.mark.slow)])
def test_a_budget_of_exactly_a_levels_size_is_used(made: Recipe, level: int) -> None:
    made = with_training(made, global_batch_size=1)
    counts = (max(0, level - LAYERS), LAYERS - abs(level - LAYERS))
    exactly = with_training(made, activation_checkpointing={"full": counts[0], "mlp": counts[1]})
    found = planned(made, takes(exactly))
    level_found = 2 * found.checkpointed_layers + found.checkpointed_mlps
    assert level_found <= level
    assert found.loss_chunk == 1024


class Linear:
    """A forecaster whose memory is a sum over rows, layers and logits."""

    cuda = False

    def __init__(self, layers: int, mlp: float | None, kept: tuple[int, int, int], least: int, logits: int):
        self.arch: Any = SimpleNamespace(
            layers=layers,
            recomputed=(0.75, mlp),
            loss_chunk=lambda recipe: recipe.training.loss_chunk or 1024,
        )
        self.kept, self.least, self.logits = sorted(kept), least, logits

    def forecast(self, recipe: Recipe, workload: Any) -> Any:
        training = recipe.training
        whole, mlps = training.activation_checkpointing.full, training.activation_checkpointing.mlp
        counts = (whole, mlps, self.arch.layers - whole - mlps)
        kept = sum(count * size for count, size in zip(counts, self.kept, strict=True))
        parts = dict.fromkeys(PARTS, 0)
        parts["saved_activations"] = 1000 + training.micro_batch_size * max(self.least, kept)
        parts["logits_and_loss"] = self.logits * (training.loss_chunk or 1024)
        return SimpleNamespace(trace=SimpleNamespace(peak=lambda: ("loss", parts)))


@settings(deadline=None, max_examples=60)
@given(
    layers=st.integers(1, 5),
    mlp=st.sampled_from([None, 0.5]),
    kept=st.tuples(*[st.integers(1, 30)] * 3),
    least=st.integers(0, 50),
    logits=st.integers(0, 1),
    tokens=st.sampled_from([64, 512, 4096]),
    budget=st.integers(1000, 3000),
)
def test_no_fitting_policy_has_less_work_than_the_plan(
    layers: int,
    mlp: float | None,
    kept: tuple[int, int, int],
    least: int,
    logits: int,
    tokens: int,
    budget: int,
) -> None:
    forecaster: Any = Linear(layers, mlp, kept, least, logits)
    load: Any = SimpleNamespace(train=SimpleNamespace(input_ids=torch.zeros(1, tokens)))
    counts = {(0 if mlp is None else layers - whole, whole) for whole in range(layers + 1)}
    counts |= {(mlps, 0) for mlps in range(1 if mlp is None else layers)}
    work = {
        Policy(rows, whole, mlps, offload=False, loss_chunk=chunk): (
            (2 + (0.75 * whole + (mlp or 0) * mlps) / layers)
            * (8 * tokens + DEQUANTIZATION_TOKENS * 8 / rows)
        )
        for rows in (1, 2, 4, 8)
        for mlps, whole in counts
        for chunk in (1024, 256)
    }
    size = {policy: needed(forecaster.forecast(policy.apply(PLANNED), None)) for policy in work}
    fitting = [work[policy] for policy in work if size[policy] <= budget]
    tried: list[str] = []
    if not fitting:
        with pytest.raises(OutOfMemoryError, match=r"training\.memory: one row"):
            plan(PLANNED, lambda _: load, budget, forecaster, tried.append)
        return
    found = plan(PLANNED, lambda _: load, budget, forecaster, tried.append)
    policy = Policy(**{field.name: getattr(found, field.name) for field in fields(Policy)})
    assert size[policy] == found.needed_bytes <= budget
    assert work[policy] == pytest.approx(min(fitting))
    assert policy.loss_chunk == 1024 or size[replace(policy, loss_chunk=1024)] > budget
    assert len(tried) == len(set(tried))


def test_a_plan_recomputes_layers_of_transformers_whole(tmp_path: Path) -> None:
    made = recipe(tmp_path, "opt", layers=4, training={"global_batch_size": 1, "micro_batch_size": 1})
    least, most = (takes(with_training(made, activation_checkpointing={"full": layers})) for layers in (4, 0))
    found = planned(made, (least + most) // 2)
    assert 0 < found.checkpointed_layers < 4
    assert found.checkpointed_mlps == 0
    wrong = with_training(made, activation_checkpointing="mlp")
    with pytest.raises(
        RecipeError,
        match=r"no fused layers, so its MLPs cannot be recomputed alone.*activation_checkpointing=full, or none",
    ):
        takes(wrong)


@pytest.mark.parametrize(
    ("adapter", "cause"),
    [
        ({"method": "dora"}, "adapter.method: only layers with LoRA are fused"),
        (
            {"train_modules": ["input_layernorm"]},
            "adapter.train_modules: .*input_layernorm.weight is trained",
        ),
    ],
)
def test_the_cause_is_named_where_mlps_cannot_be_recomputed_alone(
    tmp_path: Path, adapter: dict[str, Any], cause: str
) -> None:
    wrong = with_training(
        recipe(tmp_path, "llama", layers=2, adapter=adapter), activation_checkpointing="mlp"
    )
    with pytest.raises(RecipeError, match=f"{cause}.*, so its MLPs cannot be recomputed alone"):
        takes(wrong)


def test_a_budget_that_nothing_fits_is_refused_with_what_it_takes(made: Recipe) -> None:
    with pytest.raises(
        OutOfMemoryError,
        match=r"training\.memory: one row .* [12]\.\d+ MiB by forecast, but the budget is 0\.500 MiB",
    ):
        planned(made, MIB // 2)


@pytest.mark.slow
def test_if_nothing_fits_inputs_are_offloaded_to_the_host(tmp_path: Path) -> None:
    made = recipe(tmp_path, "llama", layers=9, data={"max_length": 256}, training={"global_batch_size": 2})
    arch = architecture(made, cuda=True)

    def planned_within(budget: int) -> Plan:
        return plan(made, lambda changed: sized(changed, assumed(made)), budget, Forecaster(arch, cuda=True))

    smallest = with_training(made, micro_batch_size=1, loss_chunk=256)
    least, less = (
        needed(forecast(one, sized(one, assumed(made)), arch, cuda=True))
        for one in (smallest, with_training(smallest, activation_offloading=True))
    )
    assert not planned_within(least).offload
    found = planned_within(least - 1)
    assert found.offload
    assert found.needed_bytes < least
    assert found.apply(made).training.activation_offloading
    assert "activation_offloading=true" in found.why
    with pytest.raises(OutOfMemoryError, match=r"training\.memory: one row"):
        planned_within(less - 1)


@pytest.mark.slow
def test_a_recipe_changed_by_a_plan_can_be_written_and_read(made: Recipe, tmp_path: Path) -> None:
    file = tmp_path / "planned.yaml"
    made = with_training(made, global_batch_size=2)
    for offload, budget in ((True, int(2.5 * MIB)), (False, 100 * MIB)):  # with some recompute, and with none
        wanted = with_training(made, activation_offloading=offload, memory="100MiB")
        found = planned(wanted, budget)
        assert (found.checkpointed_layers + found.checkpointed_mlps > 0) == offload
        applied = found.apply(wanted)
        file.write_text(applied.to_yaml())
        assert Recipe.load(file) == applied


def test_a_planned_run_trains_as_an_unplanned_one(recipe_file: RecipeFile, tmp_path: Path) -> None:
    file = recipe_file(training={"micro_batch_size": 1, "global_batch_size": 2})
    plain = train(Recipe.load(file, [f"output={tmp_path}/plain"]), terminal=False)
    tight = train(Recipe.load(file, [f"output={tmp_path}/tight", "training.memory=2MiB"]), terminal=False)
    assert plain.loss_after == pytest.approx(tight.loss_after, rel=1e-4)
    chosen = json.loads((tmp_path / "tight/run.json").read_text())["plan"]
    assert sum(chosen["activation_checkpointing"].values()) > 0
    memory = json.loads((tmp_path / "tight/memory.json").read_text())
    assert memory["measured"]["total_bytes"] <= 2 * MIB
    assert memory["forecast"]["total_bytes"] == pytest.approx(memory["measured"]["total_bytes"], rel=0.01)


@pytest.mark.slow
def test_a_resumed_run_keeps_its_plan(recipe_file: RecipeFile, monkeypatch: pytest.MonkeyPatch) -> None:
    import qlora.memory.run_memory as record

    file = recipe_file(training={"save_every": 2, "max_steps": 3, "memory": "auto"})
    train(Recipe.load(file), terminal=False)
    output = Recipe.load(file).output
    before = json.loads(Path(output, "run.json").read_text())["plan"]

    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("planned again")

    monkeypatch.setattr(record, "plan", forbidden)
    for steps, lost in ((4, []), (5, ["run.json"])):
        for name in ("result.json", *lost):
            Path(output, name).unlink()
        train(Recipe.load(file, [f"training.max_steps={steps}"]), resume=True, terminal=False)
        assert json.loads(Path(output, "run.json").read_text())["plan"] == before


def test_advised_changes_make_it_fit_cheapest_first(tmp_path: Path) -> None:
    made = recipe(tmp_path, "llama", layers=6, training={"global_batch_size": 4})
    large = with_training(made, micro_batch_size=4, activation_checkpointing={"mlp": 2})
    whole = takes(large)
    found = estimate(large, 600 * MIB)
    assert found.fits
    assert found.largest_micro_batch is not None
    assert found.largest_micro_batch > 4
    context = found.needed_bytes - whole
    tight = estimate(large, context + whole // 2)
    assert not tight.fits
    assert tight.changes[0].settings[0].startswith("training.micro_batch_size=")
    assert tight.changes[1].settings == ("training.activation_checkpointing=full",)
    for change in tight.changes:
        assert change.needed_bytes <= context + whole // 2
        file = tmp_path / "large.yaml"
        file.write_text(large.to_yaml())
        Recipe.load(file, " ".join(change.settings).split())  # the advised settings are valid together


@pytest.mark.slow
def test_the_mildest_change_that_fits_is_advised_or_none(tmp_path: Path) -> None:
    made = recipe(tmp_path, "llama", layers=6, training={"global_batch_size": 4})
    large = with_training(made, micro_batch_size=4, activation_checkpointing={"mlp": 2})
    context = estimate(large, 600 * MIB).needed_bytes - takes(large)
    mild = estimate(large, context + takes(with_training(large, activation_checkpointing="mlp")))
    assert ("training.activation_checkpointing=mlp",) in [change.settings for change in mild.changes]
    nothing = estimate(large, context // 2)
    assert not nothing.changes
    assert "smaller model" in list(nothing.lines())[-1]


def test_changes_that_only_cost_time_are_advised_first(tmp_path: Path) -> None:
    made = recipe(
        tmp_path,
        "llama",
        layers=9,
        data={"max_length": 256},
        training={"micro_batch_size": 2, "global_batch_size": 2, "device": "auto"},
    )
    arch = architecture(made, cuda=True)
    single = with_training(made, micro_batch_size=1)
    least = needed(forecast(single, sized(single, assumed(made)), arch, cuda=True))
    advised = [change.settings for change in estimate(made, least - 1).changes]
    assert advised[0] == ("training.micro_batch_size=1", "training.activation_offloading=true")
    assert advised[1:] == [("data.max_length=128",)]


def test_estimate_and_run_forecast_the_same_batch(recipe_file: RecipeFile, tmp_path: Path) -> None:
    """Without computed padding, the batch with the widest row need not be the largest."""
    data = tmp_path / "rows.jsonl"
    words = [90, 2, 2, 2, 2, 2, *[45] * 6]
    rows = ({"prompt": "a", "completion": " go" * count} for count in words)
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = {"source": str(data), "format": "prompt-completion", "held_out": 2, "limit": None}
    for seed in range(40):
        training = {
            "micro_batch_size": 4,
            "global_batch_size": 4,
            "max_steps": 3,
            "seed": seed,
            "device": "cpu",
        }
        made = Recipe.load(str(recipe_file(data=section, training=training)))
        dataset = load_dataset(made.data, load_tokenizer(made.base), seed)
        batches = training_batches(dataset, made)
        if batches.largest(3, padded=True)[0] != batches.largest(3, padded=False)[0]:
            break
    else:
        raise AssertionError("no order tells the two apart")
    run = RunMemory.of(made, dataset, batches, 3, torch.device("cpu"))
    assert run.forecast is not None
    assert run.workload.step == batches.largest(3, padded=False)[0]
    assert estimate(made).memory["forecast"]["total_bytes"] == run.forecast.total_bytes


@pytest.mark.parametrize(
    "words",
    [
        pytest.param((40, 60), id="the loss takes the most"),
        pytest.param((90, 4), id="the longest row does", marks=pytest.mark.slow),
    ],
)
def test_the_most_expensive_row_is_forecast_by_length_and_trained_tokens(
    recipe_file: RecipeFile, tmp_path: Path, words: tuple[int, int]
) -> None:
    """The longest row trains two tokens; the other is shorter and trains most of its tokens."""
    data, held_out = tmp_path / "rows.jsonl", tmp_path / "held_out.jsonl"
    held_out.write_text(json.dumps({"prompt": "a", "completion": " go"}))
    asked, told = words
    rows = [
        {"prompt": " go" * 100, "completion": " go"},
        {"prompt": " go" * asked, "completion": " go" * told},
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = recipe_file(
        base={"compute_dtype": "bfloat16"},
        data={"source": str(data), "format": "prompt-completion", "held_out": str(held_out), "limit": None},
        training={"micro_batch_size": 1, "global_batch_size": 1, "max_steps": 2},
    )
    with patch("qlora.tracking.BACKENDS", {}):  # a trial opens no tracker
        found = profile(Recipe.load(file), 2)
    assert found["forecast"]["total_bytes"] == pytest.approx(found["measured"]["total_bytes"], rel=0.01)
    assert found["forecast"]["peak"] == found["measured"]["peak"]
    assert (found["workload"]["supervised"] > 10) == (told > 50)
    trained = train(Recipe.load(file), terminal=False).run / "memory.json"
    assert json.loads(trained.read_text())["measured"]["total_bytes"] == found["measured"]["total_bytes"]


@given(
    kink=st.integers(1, 2000),
    slopes=st.tuples(st.integers(1, 10_000), st.integers(1, 10_000)),
    fits=st.integers(1, 16),
    limit=st.integers(16, 2048),
    room=st.floats(0, 1.5),
)
def test_the_largest_that_fits_is_found_though_memory_does_not_grow_evenly(
    kink: int, slopes: tuple[int, int], fits: int, limit: int, room: float
) -> None:
    asked: list[int] = []

    def size(number: int) -> int:
        asked.append(number)
        return 10**6 + slopes[0] * min(number, kink) + slopes[1] * max(0, number - kink)

    bound = size(fits) + int(room * (size(limit) - size(fits)))
    asked.clear()
    largest = about_largest(size, bound, fits, limit)
    assert len(asked) <= 2 + MOST_FORECASTS
    assert size(largest) <= bound
    assert largest == limit or size(min(limit, largest + max(1, largest // 40) + 1)) > bound
