"""Every method of the registry learns the quickstart, resumes bit for bit, merges and comes back from its folder."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qlora.adapter.merge import merge_adapter
from qlora.adapter.methods import ADAPTERS, METHODS
from qlora.inference.load import held_out_loss, load_trained
from qlora.recipe import Recipe
from qlora.training.train import train

STEPS = 50

OVERRIDES: Mapping[str, list[str]] = {
    "full": ["base.quantization=none", "optimizer.lr=5e-4"],
    "bitfit": ["optimizer.lr=1e-1"],
    "adalora": ["optimizer.lr=1e-2"],
    "vera": ["optimizer.lr=1e-1"],
}
"""settings of a method in addition to its name; a method without an entry has the quickstart's"""

VARIANTS: Mapping[str, list[str]] = {
    "lora, alpha/sqrt(rank)": ["adapter.scaling=alpha/sqrt(rank)"],
    "lora, alpha": ["adapter.scaling=alpha", "adapter.alpha=1"],
    "lora+": ["adapter.lr_ratio=16", "optimizer.lr=5e-4"],
    "lora, orthogonal": ["adapter.init=orthogonal"],
    "lora, pissa": ["adapter.init=pissa"],
    "lora, loftq": ["adapter.init=loftq"],
}

CASES = [
    *(pytest.param([f"adapter.method={name}", *OVERRIDES.get(name, [])], id=name) for name in METHODS),
    *(pytest.param(overrides, id=name, marks=pytest.mark.slow) for name, overrides in VARIANTS.items()),
]


def quickstart(output: Path, overrides: list[str]) -> Recipe:
    return Recipe.load(
        "quickstart",
        [
            f"output={output}", f"training.max_steps={STEPS}", "training.global_batch_size=2",
            "training.micro_batch_size=2", f"training.save_every={STEPS - 5}", "data.limit=150", "data.held_out=2",
            "training.samples=0", "optimizer.warmup_steps=0", "tracking.wandb.mode=disabled",
            "base.compute_dtype=float32", *overrides,
        ],
    )  # fmt: skip


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(64).view(2, 32) * 13 % 1000).logits.float()


@pytest.mark.usefixtures("without_forecast")
@pytest.mark.parametrize("overrides", CASES)
def test_a_method_learns_resumes_merges_and_comes_back(overrides: list[str], tmp_path: Path) -> None:
    recipe = quickstart(tmp_path / "run", overrides)
    done = train(recipe, terminal=False)
    losses = [json.loads(line).get("loss") for line in (done.run / "metrics.jsonl").read_text().splitlines()]
    losses = [loss for loss in losses if loss is not None]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] / 2

    assert done.result is not None
    whole = files(done.result)
    for path in (done.result, done.run / "result.json"):  # as a run that was killed five steps before its end
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    resumed = train(recipe, resume=True, terminal=False)
    assert resumed.result is not None
    assert files(resumed.result) == whole
    assert resumed.adapter == done.adapter

    loaded = load_trained(done.run)
    assert held_out_loss(loaded)[0] == pytest.approx(done.loss_after, rel=1e-6)
    trained = loaded.model
    live = logits(trained)
    if METHODS[recipe.adapter.method] not in ADAPTERS:
        return
    before = logits(load_trained(done.run, with_adapter=False).model)
    assert (live - before).norm() > 0.1 * before.norm()
    merged = logits(merge_adapter(trained))
    assert (merged - live).norm() < 0.01 * (live - before).norm()
