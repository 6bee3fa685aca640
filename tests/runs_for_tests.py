"""Writes the files of a finished LoRA run without training; the adapter's update is not zero."""

import hashlib
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qlora.adapter import lora_layers, save_adapter
from qlora.adapter.identity import BaseIdentity
from qlora.data import prompt_digests
from qlora.model.load import load_base, load_tokenizer
from qlora.model.prepare import apply_adapter
from qlora.recipe import Recipe
from qlora.training import train as loop


def update(model: nn.Module, size: float = 0.2, seed: int = 0) -> nn.Module:
    """Fill every B of `model` with random numbers of standard deviation `size`."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_b.copy_(torch.randn(layer.lora_b.shape, generator=generator) * size)
    return model


def finished_run(recipe: Recipe, *, seed: int = 0, size: float = 0.2, **adapter: Any) -> Path:
    """Write the folder of a finished run of `recipe`, with these adapter settings, and return it."""
    recipe = recipe.model_copy(update={"adapter": recipe.adapter.model_copy(update=adapter)})
    model = update(apply_adapter(load_base(recipe.base), recipe), size, seed)
    folder = Path(recipe.output) / "adapter"
    prompts = prompt_digests(recipe.data, load_tokenizer(recipe.base))
    save_adapter(model, folder, base=replace(BaseIdentity.of(model), **prompts))
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    return folder.parent


def resumed(recipe: Recipe) -> Path:
    """Resume a run to its end and return its folder."""
    return loop.train(recipe, resume=True, terminal=False).run


def killed_and_resumed(
    recipe: Recipe,
    step: int,
    monkeypatch: pytest.MonkeyPatch,
    resume: Callable[[Recipe], Path] = resumed,
) -> Path:
    """Train, stop with an error at this step (from 0), resume to the end, and return the run's folder."""
    update = loop.update

    def interrupted(session: Any, batches: Any, number: int, lr: float) -> dict[str, float]:
        if number == step:
            raise InterruptedError
        return update(session, batches, number, lr)

    monkeypatch.setattr(loop, "update", interrupted)
    with pytest.raises(InterruptedError):
        loop.train(recipe, terminal=False)
    monkeypatch.setattr(loop, "update", update)
    return resume(recipe)


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make runs save a checkpoint and stop after `step` steps, as Ctrl-C does."""
    take_step = loop.take_step

    def stopped(session: Any, number: int, tracker: Any) -> int:
        taken = take_step(session, number, tracker)
        if taken == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return taken

    monkeypatch.setattr(loop, "take_step", stopped)


def fingerprint(module: nn.Module) -> str:
    """Return a hash of every byte of a module: weights, packed weights, their statistics and all other tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode() + tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
