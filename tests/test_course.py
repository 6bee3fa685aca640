"""A method's course adds its penalty once a step, acts after every update, and survives a stop."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora.adapter import trainable_parameters
from qlora.adapter.methods import Course
from qlora.adapter.methods.lora import Lora
from qlora.data import Batch
from qlora.errors import ModelError
from qlora.objective.objective import Loss, Objective
from qlora.objective.step import accumulate
from qlora.recipe import Recipe
from qlora.training import checkpoint
from qlora.training import train as loop
from qlora.training.train import train


class Shrinking(Course):
    """Adds half of |w|² to the loss, and counts the updates."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = list(trainable_parameters(model).values())
        self.steps: list[int] = []
        self.calls = 0

    def penalty(self) -> Tensor:
        self.calls += 1
        return torch.stack([p.float().square().sum() / 2 for p in self.parameters]).sum()

    def after_step(self, step: int) -> None:
        self.steps.append(step)

    def finish(self) -> None:
        self.steps.append(-1)

    def state(self) -> dict[str, Tensor]:
        return {"steps": torch.tensor(self.steps)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.steps = state["steps"].tolist()

    def outcome(self) -> dict[str, Any]:
        return {"steps": self.steps}


class Square(Objective):
    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        return Loss(model(batch.input_ids.float()).square().sum())

    def weight(self, batch: Batch) -> int:
        return 1


def test_the_penalty_is_added_once_a_step_whatever_the_micro_batches() -> None:
    def gradient(*, micro_batches: int, processes: int, penalised: bool) -> Tensor:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        ones = torch.ones(1, 3).long()
        batches = [Batch(ones, ones, None, tokens=3, supervised=2)] * micro_batches
        penalty = Shrinking(model).penalty if penalised else None
        for rank in range(processes):
            accumulate(
                model, batches, Square(), seed=0, step=0, rank=rank, processes=processes, penalty=penalty
            )
        assert model.weight.grad is not None
        return model.weight.grad

    torch.manual_seed(0)
    weight = nn.Linear(3, 2).weight.detach()
    for micro_batches, processes in ((1, 1), (4, 1), (4, 2)):
        plain, penalised = (
            gradient(micro_batches=micro_batches, processes=processes, penalised=on) for on in (False, True)
        )
        torch.testing.assert_close(penalised - plain, weight)


@pytest.mark.usefixtures("without_forecast")
def test_a_stopped_run_continues_its_course(
    recipe_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Lora, "course", lambda self, model, settings, total_steps: Shrinking(model))
    whole = train(Recipe.load(recipe_file(), [f"output={tmp_path / 'whole'}"]), terminal=False)
    assert whole.adapter == {"steps": [0, 1, 2, 3, -1]}
    update = loop.update

    def interrupted(session: Any, batches: Any, step: int, lr: float) -> dict[str, float]:
        if step == 3:
            raise InterruptedError
        return update(session, batches, step, lr)

    file = recipe_file(training={"save_every": 2})
    with monkeypatch.context() as patched:
        patched.setattr(loop, "update", interrupted)
        with pytest.raises(InterruptedError):
            train(Recipe.load(file), terminal=False)
    folder = tmp_path / "run"
    shutil.copytree(folder, tmp_path / "short")
    short = Recipe.load(file, [f"output={tmp_path / 'short'}", "training.max_steps=2"])
    evaluate, seen = loop.evaluate_held_out, []
    monkeypatch.setattr(
        loop, "evaluate_held_out", lambda s, *rest: seen.append(s.course.steps[:]) or evaluate(s, *rest)
    )
    assert train(short, resume=True, terminal=False).adapter == {"steps": [0, 1, -1]}
    assert seen == [[0, 1, -1]], "finished before the evaluation"
    shutil.copytree(folder, tmp_path / "damaged")
    for state in (tmp_path / "damaged").glob("checkpoints/*/course.safetensors"):
        state.unlink()
    monkeypatch.setattr(
        checkpoint, "verify", lambda *_, **__: []
    )  # as if it had been written without the file
    with pytest.raises(ModelError, match=r"course\.safetensors: cannot be read"):
        train(Recipe.load(file, [f"output={tmp_path / 'damaged'}"]), resume=True, terminal=False)
    resumed = train(Recipe.load(file), resume=True, terminal=False)
    assert resumed.adapter == whole.adapter
    name = "adapter/adapter_model.safetensors"
    assert (resumed.run / name).read_bytes() == (whole.run / name).read_bytes()
    assert json.loads((resumed.run / "result.json").read_text())["adapter"] == whole.adapter
