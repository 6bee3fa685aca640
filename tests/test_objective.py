"""Another objective with its own metrics works in step, evaluation, run and forecast."""

import json
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import nn

from qlora.data import Batch
from qlora.model.head import head_of
from qlora.objective.causal_lm import CausalLM, supervised_states
from qlora.objective.objective import Loss
from qlora.objective.step import accumulate, evaluate
from qlora.recipe import Recipe
from qlora.training import prepare
from qlora.training import train as loop


class WithAccuracy(CausalLM):
    """Causal language modelling that also measures the accuracy of the tokens."""

    metrics = ("accuracy",)

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        with torch.no_grad():
            hidden, targets = supervised_states(model, batch)
            right = (head_of(model).logits(hidden).argmax(-1) == targets).sum()
        return super().loss(model, batch)._replace(metrics={"accuracy": right.float()})


def test_metrics_are_means_over_the_step_and_recorded(
    recipe_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "objective_of", lambda recipe: WithAccuracy())
    with patch("qlora.memory.run_memory.forecast", side_effect=RuntimeError("not asked for")):
        file = recipe_file(training={"max_steps": 8}, optimizer={"lr": 1e-2})
        run = loop.train(Recipe.load(file), terminal=False).run
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert all(0 <= line["accuracy"] <= 1 for line in steps)
    evaluations = [line["eval_accuracy"] for line in lines if "eval_loss" in line]
    assert evaluations[0] < 0.1 < evaluations[1], "the accuracy must rise"


def test_micro_batches_and_processes_add_up_to_the_step(recipe_file: Callable[..., Path]) -> None:
    with patch("qlora.memory.run_memory.forecast", side_effect=RuntimeError("not asked for")):
        session = loop.prepare(Recipe.load(recipe_file()), loop.DataParallel(torch.device("cpu")))
    batches, objective = session.batches.step(0), WithAccuracy()
    whole = accumulate(session.model, batches, objective, seed=0, step=0)
    shares = [
        accumulate(session.model, batches, objective, seed=0, step=0, rank=r, processes=2) for r in (0, 1)
    ]
    assert sum(share.sum.item() for share in shares) == pytest.approx(whole.sum.item(), rel=1e-6)
    idle = accumulate(session.model, batches, objective, seed=0, step=0, rank=len(batches), processes=9)
    assert idle.metrics.keys() == whole.metrics.keys(), "otherwise the processes would wait for each other"
    parts = [share.metrics["accuracy"].item() for share in shares]
    assert sum(parts) == pytest.approx(whole.metrics["accuracy"].item(), rel=1e-6)
    found, weight = evaluate(session.model, batches, objective)
    assert weight == sum(batch.supervised for batch in batches)
    assert found.sum.item() / weight == pytest.approx(whole.sum.item(), rel=1e-5)
