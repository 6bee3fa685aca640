"""Optimizers: against references, bit for bit after saving and loading, and with really paged memory on a GPU."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from gpu_for_tests import is_managed
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from qlora.errors import ModelError
from qlora.memory.live import LiveBytes
from qlora.optim import METHODS, Optimizer, flat, learning_rate, paged
from qlora.training import checkpoint

SHAPES = {"a": (8, 640), "bias": (37,), "b": (96, 8), "norm": (300,), "c": (13, 7)}
LR = {"adam": 1e-2, "lion": 1e-3}


def parameters(
    dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype))
        for name, shape in SHAPES.items()
    }


def add_gradients(params: dict[str, nn.Parameter], step: int) -> None:
    """Set gradients through autograd, as training does."""
    generator = torch.Generator().manual_seed(1000 + step)
    for parameter in params.values():
        slope = torch.randn(parameter.shape, generator=generator).to(parameter)
        (parameter * slope).sum().backward()


def train(params: dict[str, nn.Parameter], optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        add_gradients(params, step)
        optimizer.clip(1.0)
        optimizer.step(LR[METHODS[optimizer.name].rule] / (1 + step))


def clone(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


def assert_equal(left: dict[str, Any], right: dict[str, Any]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


# The update rules


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_agrees_with_torch(weight_decay: float) -> None:
    ours, theirs = parameters(), parameters()
    optimizer = Optimizer(ours, name="adamw", weight_decay=weight_decay)
    matrices = [p for p in theirs.values() if p.ndim >= 2]
    vectors = [p for p in theirs.values() if p.ndim < 2]  # vectors are never decayed
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, foreach=False)
    for step in range(5):
        reference.zero_grad()
        add_gradients(theirs, step)
        torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)
        for group in reference.param_groups:
            group["lr"] = LR["adam"] / (1 + step)
        reference.step()
    train(ours, optimizer, range(5))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw_8bit", "lion", "lion_8bit"])
def test_flat_equals_bitsandbytes_one_parameter_at_a_time(name: str) -> None:
    """Bit for bit: parameters start on block boundaries, so that no two share the scale of an 8-bit block."""
    import bitsandbytes as bnb

    cls = {"adamw_8bit": bnb.optim.AdamW8bit, "lion": bnb.optim.Lion, "lion_8bit": bnb.optim.Lion8bit}[name]
    ours, theirs = parameters(), parameters()
    optimizer = Optimizer(ours, name=name, betas=(0.9, 0.99))
    reference = cls(theirs.values(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.0, min_8bit_size=1)
    for step in range(4):
        for params, one in ((ours, optimizer), (theirs, reference)):
            one.zero_grad()
            add_gradients(params, step)
            one.step(1e-2) if one is optimizer else one.step()
    assert_equal(ours, theirs)


def test_a_group_larger_than_a_chunk_is_updated_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in METHODS:
        whole, parts = parameters(torch.bfloat16), parameters(torch.bfloat16)
        train(whole, Optimizer(whole, name=name), range(3))
        with monkeypatch.context() as patch:
            patch.setattr(flat, "CHUNK_SIZE", 1024)
            train(parts, Optimizer(parts, name=name), range(3))
        assert_equal(whole, parts)


# Flat storage


def test_parameters_and_gradients_are_views_of_flat_tensors() -> None:
    params = parameters()
    before = clone(params)
    optimizer = Optimizer(params, name="adamw")
    (gradient,) = optimizer.gradients()
    assert_equal(before, params)
    add_gradients(params, 0)
    for parameter in params.values():
        assert parameter.grad is not None
        assert parameter.grad.untyped_storage().data_ptr() == gradient.untyped_storage().data_ptr()
        assert parameter.grad.data_ptr() % 16 == 0
    squares = sum(float(p.grad.double().square().sum()) for p in params.values() if p.grad is not None)
    assert optimizer.grad_norm().item() == pytest.approx(math.sqrt(squares), rel=1e-6)


def test_gradients_are_allocated_after_the_parameters_have_moved() -> None:
    """The parameters are never in memory twice while there are gradients; this saves 1.5 GiB at 65B and rank 64."""
    model = nn.Module()
    for number in range(8):
        model.register_parameter(str(number), nn.Parameter(torch.zeros(64, 256)))
    parameters = dict(model.named_parameters())
    parameter_bytes = 8 * 64 * 256 * 4
    with LiveBytes([(parameter, "adapters") for parameter in parameters.values()]) as live:
        optimizer = Optimizer(parameters, name="lion_8bit", betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
    assert live.trace().totals.max() < 2.5 * parameter_bytes  # values, gradients, one-byte moments
    assert optimizer.gradients()[0].nbytes == parameter_bytes


def test_gradients_outside_the_flat_tensor_are_noticed() -> None:
    model = nn.Linear(4, 4)
    optimizer = Optimizer(dict(model.named_parameters()), name="adamw")
    model.zero_grad(set_to_none=True)  # autograd now creates new tensors, which the optimizer would never see
    model(torch.ones(1, 4)).sum().backward()
    with pytest.raises(AssertionError, match="zero_grad"):
        optimizer.step(1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clipping_scales_the_next_step_in_fp32(dtype: torch.dtype) -> None:
    params = parameters(dtype)
    optimizer = Optimizer(params, name="adamw", betas=(0.9, 0.999))
    add_gradients(params, 0)
    gradients = {name: p.grad.float() for name, p in params.items() if p.grad is not None}
    norm = optimizer.clip(0.5)
    assert norm.item() > 10
    optimizer.step(1e-3)
    for name, gradient in gradients.items():
        expected = 0.1 * (gradient * (0.5 / norm))  # the first moment after one step
        torch.testing.assert_close(optimizer.state()[f"{name}.moment1"], expected, rtol=1e-6, atol=0)


def test_small_gradients_are_not_clipped_and_zero_grad_resets_a_clip() -> None:
    params, plain = parameters(), parameters()
    clipped, unclipped = Optimizer(params, name="adamw"), Optimizer(plain, name="adamw")
    add_gradients(params, 0)
    clipped.clip(1e-3)
    clipped.zero_grad()  # the step was skipped, so the next one must not be scaled
    for one, of in ((params, clipped), (plain, unclipped)):
        add_gradients(one, 0)
        of.step(1e-2)
        of.zero_grad()
        add_gradients(one, 1)
    clipped.clip(1e9)
    clipped.step(1e-2)
    unclipped.step(1e-2)
    assert_equal(params, plain)


def test_state_bytes_count_every_state_tensor() -> None:
    padded = sum(-(-math.prod(shape) // 256) * 256 for shape in SHAPES.values())
    wide = Optimizer(parameters(torch.bfloat16), name="adamw").state_bytes()
    assert wide == {
        "parameters": 2 * padded,
        "gradients": 2 * padded,
        "remainder": 2 * padded,
        "moments": 8 * padded,
    }
    narrow = Optimizer(parameters(), name="lion_8bit").state_bytes()
    assert narrow["remainder"] == 0
    assert narrow["moments"] == padded + 4 * padded // 256 + 4 * 256  # with the scales and the table of codes


@given(
    st.lists(
        st.floats(width=32, allow_nan=False, allow_infinity=False, max_value=2.0**127, min_value=-(2.0**127)),
        min_size=1,
    )
)
def test_a_bf16_value_and_its_remainder_give_an_fp32_number(numbers: list[float]) -> None:
    master = torch.tensor(numbers)
    value, remainder = (
        torch.empty_like(master, dtype=torch.bfloat16),
        torch.empty_like(master, dtype=torch.int16),
    )
    flat.split(master.clone(), value, remainder)
    assert torch.equal(flat.joined(value, remainder), master)
    # no bf16 number is closer
    error, best = (
        (value.double() - master.double()).abs(),
        (master.bfloat16().double() - master.double()).abs(),
    )
    assert torch.equal(error, best)


# Saving


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", METHODS)
def test_resumed_equals_uninterrupted(name: str, dtype: torch.dtype, tmp_path: Any) -> None:
    """Bit for bit, saved to a file at every step and trained from there to the end."""
    params = parameters(dtype)
    optimizer = Optimizer(params, name=name, weight_decay=0.01)
    saved = []
    for step in range(6):
        file = tmp_path / f"{step}.safetensors"
        checkpoint.save_tensors(file, optimizer.state())
        saved.append((file, clone(params)))
        train(params, optimizer, range(step, step + 1))
    for step, (file, values) in enumerate(saved):
        other = parameters(dtype, seed=99)
        resumed = Optimizer(other, name=name, weight_decay=0.01)
        for key, value in values.items():
            other[key].data.copy_(value)
        resumed.load_state(checkpoint.load_tensors(file))
        train(other, resumed, range(step, 6))
        assert_equal(params, other)
        assert_equal(optimizer.state(), resumed.state())


def test_state_is_named_by_parameter_and_independent_of_their_order() -> None:
    params = parameters(torch.bfloat16)
    optimizer = Optimizer(params, name="adamw_8bit")
    train(params, optimizer, range(3))
    state = clone(optimizer.state())
    assert int(state["steps.adamw_8bit"]) == 3
    assert state["a.value"].shape == state["a.remainder"].shape == (8, 640)
    assert state["a.moment2"].shape == (20, 256)
    assert state["a.absmax1"].shape == (20,)
    other = dict(reversed(parameters(torch.bfloat16, seed=5).items()))
    resumed = Optimizer(other, name="adamw_8bit")
    resumed.load_state(state)  # restores the parameters too
    assert_equal(params, other)
    assert_equal(state, resumed.state())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: {k: v for k, v in s.items() if k != "steps.adamw"},
            "belongs to no optimizer of qlora, but optimizer.name is adamw",
        ),
        (lambda s: {"steps.lion": s.pop("steps.adamw")} | s, "belongs to lion, but optimizer.name is adamw"),
        (
            lambda s: s | {"a.moment1": torch.zeros(16, 640)},
            r"a.moment1 is float32 \[16, 640\] in the checkpoint, float32 \[8, 640\]",
        ),
        (lambda s: s | {"b.moment2": s["b.moment2"].bfloat16()}, "b.moment2 is bfloat16"),
        (
            lambda s: {k: v for k, v in s.items() if not k.startswith("norm.")},
            "norm.moment1 is missing in the checkpoint",
        ),
        (
            lambda s: s | {"d.moment1": torch.zeros(4)},
            r"d.moment1 is float32 \[4\] in the checkpoint, missing here",
        ),
    ],
)
def test_a_foreign_state_is_refused_and_nothing_changes(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str
) -> None:
    params = parameters()
    optimizer = Optimizer(params, name="adamw")
    train(params, optimizer, range(2))
    before = clone(optimizer.state())
    with pytest.raises(ModelError, match=message):
        optimizer.load_state(change(clone(Optimizer(parameters(), name="adamw").state())))
    assert_equal(before, optimizer.state())


# Learning rate


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@given(total=st.integers(1, 500), warmup=st.integers(0, 600), lr=st.floats(1e-6, 1.0))
def test_learning_rate_rises_to_lr_then_never_rises_and_is_never_zero(
    schedule: str, total: int, warmup: int, lr: float
) -> None:
    rates = [learning_rate(schedule, lr, step, total, warmup) for step in range(total)]
    assert all(0 < rate <= lr * (1 + 1e-12) for rate in rates)
    top = min(warmup, total)
    assert all(a < b for a, b in pairwise(rates[:top]))
    assert all(a >= b for a, b in pairwise(rates[top:]))
    if warmup < total:
        assert rates[warmup] == lr


def test_learning_rate_values() -> None:
    assert [learning_rate("linear", 8.0, step, 6, 2) for step in range(6)] == [4, 8, 8, 6, 4, 2]
    assert learning_rate("cosine", 1.0, 5, 10) == pytest.approx(0.5)
    assert [learning_rate("constant", 3.0, step, 3, 1) for step in range(3)] == [3, 3, 3]
    with pytest.raises(ValueError, match="constant, linear or cosine"):
        learning_rate("step", 1.0, 0, 1)


# On a GPU; a slow test runs the same code on a CPU

ON_BOTH = [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)]


def large(dtype: torch.dtype, device: str) -> dict[str, nn.Parameter]:
    """Return 1.05M elements: with 4 MB of fp32, no test here needs more than 100 MB of managed memory."""
    generator = torch.Generator().manual_seed(0)
    made = {f"w{i}": torch.randn(1024, 128, generator=generator) for i in range(8)}
    return {name: nn.Parameter(value.to(device, dtype)) for name, value in made.items()}


@pytest.mark.parametrize("device", ON_BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.paged])
def test_paged_states_stay_paged_and_exact_over_a_resume(
    name: str, dtype: torch.dtype, device: str, tmp_path: Any
) -> None:
    params, other = large(dtype, device), large(dtype, device)
    optimizer, resumed = Optimizer(params, name=name), Optimizer(other, name=name)
    sizes = optimizer.state_bytes()
    if device == "cuda":  # nothing pages on a CPU
        assert 0.9 * (sizes["remainder"] + sizes["moments"]) < optimizer.paged_bytes() < 50e6
    train(params, optimizer, range(3))
    checkpoint.save_tensors(tmp_path / "state.safetensors", optimizer.state())
    for key, parameter in params.items():
        other[key].data.copy_(parameter.data)
    resumed.load_state(checkpoint.load_tensors(tmp_path / "state.safetensors"))
    train(params, optimizer, range(3, 6))
    train(other, resumed, range(3, 6))
    assert_equal(params, other)
    assert_equal(optimizer.state(), resumed.state())
    for one in (optimizer, resumed):
        for tensor in (t for group in one._groups for t in group.states.values()):
            if tensor.numel() >= paged.MIN_SIZE:
                assert tensor.device.type == device
                assert device == "cpu" or (paged.is_paged(tensor) and is_managed(tensor))


@pytest.mark.parametrize("device", ON_BOTH)
@pytest.mark.parametrize("name", METHODS)
def test_gpu_updates_agree_with_the_cpu(name: str, device: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        on_gpu = large(dtype, device)
        on_cpu = {key: nn.Parameter(value.detach().cpu()) for key, value in on_gpu.items()}
        before = {key: value.detach().clone() for key, value in on_cpu.items()}
        train(on_gpu, Optimizer(on_gpu, name=name), range(3))
        train(on_cpu, Optimizer(on_cpu, name=name), range(3))
        for key, start in before.items():
            moved = (on_cpu[key] - start).float()
            error = (on_gpu[key].cpu() - on_cpu[key]).float()
            # 8-bit codes and Lion's signs rarely flip where the two devices round differently
            assert error.norm() < (0.1 if METHODS[name].bits == 8 or "lion" in name else 0.02) * moved.norm()


@pytest.mark.parametrize("exact", [True, False])
def test_sums_of_512_gradients_are_exact_if_wanted(exact: bool) -> None:
    params = parameters(torch.bfloat16)
    optimizer = Optimizer(params, name="adamw", exact_sums=exact)
    expected = {name: torch.zeros(parameter.shape, dtype=torch.float64) for name, parameter in params.items()}
    generator = torch.Generator().manual_seed(0)
    for _ in range(512):
        for name, parameter in params.items():  # a mean and noise, as gradients of micro-batches have
            slope = (1 + torch.randn(parameter.shape, generator=generator)).to(parameter)
            (parameter * slope).sum().backward()
            expected[name] += slope
    found = torch.cat([parameter.grad.double().flatten() for parameter in params.values()])  # type: ignore[union-attr]
    wanted = torch.cat([tensor.flatten() for tensor in expected.values()])
    error = ((found - wanted).norm() / wanted.norm()).item()
    assert error < 1e-6 if exact else error > 0.01
    assert optimizer.state_bytes()["gradients"] == (2 if exact else 1) * optimizer.state_bytes()["parameters"]
    optimizer.clip(1.0)
    optimizer.step(1e-3)
    optimizer.zero_grad()
    assert not any(parameter.grad.any() for parameter in params.values())  # type: ignore[union-attr]
