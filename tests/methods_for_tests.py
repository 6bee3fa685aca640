"""Checks that every adapter method must pass, on a tiny Llama."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from qlora.adapter import load_adapter, save_adapter, select, trainable_parameters
from qlora.adapter.adapted_linear import AdaptedLinear
from qlora.adapter.methods import METHODS, Course
from qlora.adapter.store import method_of
from qlora.data import Batch
from qlora.objective.step import accumulate
from qlora.optim import Optimizer
from qlora.quantization import nf4
from qlora.recipe import Adapter

IDS = torch.arange(24).view(2, 12) * 7
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def tiny(folder: Path, dtype: torch.dtype = torch.float32, *, quantized: bool = False) -> nn.Module:
    """Return the tiny Llama with the same weights at every call, its linears in NF4 if `quantized`."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
    for name in select(model, "all-linear") if quantized else ():
        model.set_submodule(name, nf4.NF4Linear(nf4.quantize(model.get_submodule(name).weight)))
    return model.train()


def adapted(model: nn.Module, method: str, size: float = 0.0, **settings: Any) -> nn.Module:
    """Apply a method to every linear; then add normal numbers of this standard deviation to all it trains."""
    METHODS[method].apply(model, Adapter(method=method, targets="all-linear", **settings), seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    return model


def logits(model: nn.Module) -> Tensor:
    """Return the logits of a fixed batch in eval mode, in fp32."""
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


def assert_merges(model: nn.Module, plain: nn.Module) -> None:
    """Assert that plain linears with the merged weights compute the same, to 1% of the adapter's effect."""
    live, before = logits(model), logits(plain)
    with torch.no_grad():
        for name, layer in AdaptedLinear.of(model).items():
            merged = nn.Linear(layer.in_features, layer.out_features, layer.base.bias is not None)
            merged.weight.copy_(layer.merged_weight())
            plain.set_submodule(name, merged.to(live.dtype))
    assert (live - before).abs().max() > 0.05
    assert (logits(plain.float()) - live).abs().max() < 0.01 * (live - before).abs().max()


def assert_saved_and_loaded(model: nn.Module, base: nn.Module, folder: Path) -> dict[str, Any]:
    """Assert that `base` with the saved adapter computes the same bits. Returns the fields of the saved config."""
    save_adapter(model, folder)
    wanted = logits(model)
    load_adapter(base, folder)
    assert method_of(AdaptedLinear.of(base)) is method_of(AdaptedLinear.of(model))
    assert torch.equal(logits(base), wanted)
    return json.loads((folder / "adapter_config.json").read_text())


def batch(number: int) -> Batch:
    """Return a small batch with all tokens supervised."""
    ids = torch.randint(0, 2048, (2, 16), generator=torch.Generator().manual_seed(number))
    return Batch(ids, ids, None, tokens=32, supervised=30)


def optimizer_over(model: nn.Module) -> Optimizer:
    return Optimizer(trainable_parameters(model), name="adamw", exact_sums=True)


def train(
    model: nn.Module, optimizer: Optimizer, steps: range, lr: float, course: Course | None = None
) -> list[float]:
    """Take training steps of two micro-batches over the same two batches. Returns the losses."""
    losses, course = [], course or Course()
    for step in steps:
        optimizer.zero_grad()
        batches = [batch(0), batch(1)]
        loss = accumulate(model.train(), batches, seed=0, step=step, penalty=course.penalty)
        losses.append(loss.sum.item())
        optimizer.clip(1.0)
        optimizer.step(lr)
        course.after_step(step)
    return losses


def assert_resumes(
    make: Callable[[], nn.Module],
    folder: Path,
    *,
    lr: float = 1e-2,
    steps: int = 6,
    stop: int = 3,
    course: Callable[[nn.Module, int], Course] = lambda model, steps: Course(),
) -> nn.Module:
    """Assert that training, saved and loaded after `stop` steps, ends with the same bits, and that the loss falls.

    Returns:
        The trained model.
    """
    models = [make() for _ in range(3)]
    courses = [course(model, steps) for model in models]
    optimizers = [optimizer_over(model) for model in models]
    losses = train(models[0], optimizers[0], range(steps), lr, courses[0])
    courses[0].finish()
    assert losses[-1] < losses[0] - 0.1
    train(models[1], optimizers[1], range(stop), lr, courses[1])
    save_adapter(models[1], folder)
    load_adapter(models[2], folder)
    optimizers[2].load_state(optimizers[1].state())
    courses[2].load_state(courses[1].state())
    train(models[2], optimizers[2], range(stop, steps), lr, courses[2])
    courses[2].finish()
    ended = trainable_parameters(models[2])
    assert ended
    assert all(torch.equal(ended[name], value) for name, value in trainable_parameters(models[0]).items())
    return models[0]
