"""`training.memory` sets the same budget in `qlora estimate` and `qlora train`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora.data import load_dataset
from qlora.memory import budget, estimate, measure, run_memory
from qlora.model.load import load_tokenizer
from qlora.recipe import Recipe

RecipeFile = Callable[..., Path]
GIB = 2**30
CONTEXT_BYTES = 500 * 10**6
GPU = torch.device("cuda")


class Planned(Exception):
    """Raised in place of the search for a plan."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Record (budget in bytes, shapes of the batches) of every requested plan; no plan is computed."""
    found: list[Any] = []

    def plan(recipe: Recipe, workload_of: Any, budget_bytes: int, *rest: Any) -> None:
        shapes = []
        for rows in (1, 2):
            changed = recipe.model_copy(
                update={
                    "training": recipe.training.model_copy(update={"micro_batch_size": rows, "memory": None})
                }
            )
            train = workload_of(changed).train
            shapes.append((train.input_ids.shape, train.tokens, train.supervised))
        found.append((budget_bytes, shapes))
        raise Planned

    for module in (estimate, run_memory):
        monkeypatch.setattr(module, "plan", plan)
    return found


def card(monkeypatch: pytest.MonkeyPatch, capacity: int, held_by_others: int = 0) -> None:
    """Simulate a GPU of `capacity` on which this process already has a context."""
    monkeypatch.setattr(measure, "capacity_bytes", lambda device: capacity if device.type == "cuda" else None)
    monkeypatch.setattr(measure, "free_bytes", lambda device: capacity - CONTEXT_BYTES - held_by_others)


@pytest.mark.parametrize("memory", ["auto", "20GiB"])
def test_estimate_and_train_plan_the_same_for_an_empty_gpu(
    recipe_file: RecipeFile, monkeypatch: pytest.MonkeyPatch, asked: list[Any], memory: str
) -> None:
    card(monkeypatch, 24 * GIB)
    made = Recipe.load(
        recipe_file(
            training={"memory": memory, "micro_batch_size": 1, "global_batch_size": 2, "device": "auto"}
        )
    )
    dataset = load_dataset(made.data, load_tokenizer(made.base), made.training.seed)
    with pytest.raises(Planned):
        run_memory.budgeted(made, dataset, GPU)
    with pytest.raises(Planned):
        estimate.estimate(made, 24 * GIB)
    assert asked[0] == asked[1]
    assert asked[0][0] == (20 * GIB if memory == "20GiB" else int(0.95 * 24 * GIB))


def test_auto_excludes_memory_held_by_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    card(monkeypatch, 24 * GIB, held_by_others=4 * GIB)
    assert budget.resolve_budget("auto", GPU) == pytest.approx(0.95 * 20 * GIB, rel=0.01)
    assert budget.resolve_budget("auto", GPU, 80 * GIB) == int(0.95 * 80 * GIB)
    assert budget.resolve_budget("24GiB", GPU) == 24 * GIB


def test_auto_on_a_cpu_is_most_of_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "free_bytes", lambda device: 8 * GIB)
    assert budget.resolve_budget("auto", torch.device("cpu")) == int(0.95 * 8 * GIB)
