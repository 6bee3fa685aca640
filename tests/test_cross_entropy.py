"""The fused head and loss: exact against fp64, and never more logits in memory than one chunk."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from qlora.data import IGNORE_INDEX
from qlora.ops import linear_cross_entropy
from qlora.ops.cross_entropy import tokens_at_once
from qlora.ops.trained_rows import Rows, replace_rows


class Recorder(TorchDispatchMode):
    """Records the size of an operator's largest result, in elements, and the number of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.products = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel())
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return result


def reference(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, softcap: float | None, scale: float
) -> Tensor:
    logits = F.linear(hidden, weight, bias) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")


def case(tokens: int, width: int, vocabulary: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Return trainable hidden states, weight and bias, and labels of which a third are ignored."""
    labels = torch.randint(0, vocabulary, (tokens,))
    labels[torch.rand(tokens) < 1 / 3] = IGNORE_INDEX
    shapes = (tokens, width), (vocabulary, width), (vocabulary,)
    return *(torch.randn(shape).to(dtype).requires_grad_() for shape in shapes), labels


def double(tensor: Tensor) -> Tensor:
    return tensor.detach().double().requires_grad_()


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(0, 40),
    width=st.integers(1, 33),
    vocabulary=st.integers(1, 50),
    chunk=st.sampled_from([1, 7, 1024]),
    biased=st.booleans(),
    softcap=st.sampled_from([None, 5.0, 30.0]),
    scale=st.sampled_from([1.0, 0.0625]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_loss_and_all_gradients_agree_with_fp64(
    tokens: int,
    width: int,
    vocabulary: int,
    chunk: int,
    biased: bool,
    softcap: float | None,
    scale: float,
    dtype: torch.dtype,
) -> None:
    hidden, weight, bias, labels = case(tokens, width, vocabulary, dtype)
    loss = linear_cross_entropy(hidden, weight, labels, bias if biased else None, softcap, scale, chunk)
    (loss * 0.37).backward()
    exact = [double(tensor) for tensor in (hidden, weight, bias)]
    expected = reference(exact[0], exact[1], labels, exact[2] if biased else None, softcap, scale)
    (expected * 0.37).backward()
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-5}
    assert (loss.dtype, loss.shape) == (dtype, ())
    torch.testing.assert_close(loss.double(), expected, **tolerance)
    for found, wanted in zip((hidden, weight, bias)[: 2 + biased], exact, strict=False):
        assert found.grad.dtype == dtype
        torch.testing.assert_close(found.grad.double(), wanted.grad, **tolerance)


@settings(deadline=None, max_examples=40)
@given(
    vocabulary=st.integers(2, 30),
    replaced=st.integers(0, 2),
    added=st.integers(0, 3),
    chunk=st.sampled_from([1, 7, 1024]),
    biased=st.booleans(),
    softcap=st.sampled_from([None, 5.0]),
    scale=st.sampled_from([1.0, 0.0625]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_trained_rows_have_the_gradient_of_the_whole_head(
    vocabulary: int,
    replaced: int,
    added: int,
    chunk: int,
    biased: bool,
    softcap: float | None,
    scale: float,
    dtype: torch.dtype,
) -> None:
    size = vocabulary + added
    hidden, weight, bias, _ = case(20, 9, vocabulary, dtype)
    labels = torch.randint(0, size, (20,))
    labels[::4] = IGNORE_INDEX
    ids = torch.cat([torch.randperm(vocabulary)[:replaced], torch.arange(vocabulary, size)])
    values = torch.randn(len(ids), 9, dtype=dtype, requires_grad=True)
    rows = Rows(ids, values, size)
    given = bias if biased else None
    loss = linear_cross_entropy(hidden, weight.detach(), labels, given, softcap, scale, chunk, rows=rows)
    (loss * 0.37).backward()
    exact = [double(tensor) for tensor in (hidden, bias)]
    whole = F.pad(weight.detach().double(), (0, 0, 0, added)).index_copy(0, ids, values.detach().double())
    whole.requires_grad_()
    expected = reference(
        exact[0], whole, labels, F.pad(exact[1], (0, added)) if biased else None, softcap, scale
    )
    (expected * 0.37).backward()
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-5}
    torch.testing.assert_close(loss.double(), expected, **tolerance)
    for found, wanted in [
        (hidden, exact[0].grad),
        (values, whole.grad[ids]),
        *[(bias, exact[1].grad)] * biased,
    ]:
        torch.testing.assert_close(found.grad.double(), wanted, **tolerance)


def test_trained_rows_in_bfloat16_sum_their_gradient_in_fp32() -> None:
    hidden, weight, _, labels = case(600, 64, 500, torch.bfloat16)
    ids = torch.tensor([3, 499])
    values = weight.detach()[ids].clone().requires_grad_()
    linear_cross_entropy(hidden, weight.detach(), labels, chunk=16, rows=Rows(ids, values, 500)).backward()
    exact = double(hidden), double(weight)
    reference(*exact, labels, None, None, 1.0).backward()
    for found, wanted in ((hidden.grad, exact[0].grad), (values.grad, exact[1].grad[ids])):
        assert (found.double() - wanted).norm() < 0.01 * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_embedded_rows_have_the_gradient_of_the_whole_embedding(dtype: torch.dtype) -> None:
    weight, ids = torch.randn(12, 5, dtype=dtype), torch.tensor([7, 0])
    tokens = torch.randint(0, 12, (3, 40))
    positions = torch.full((12,), 2).index_copy(0, ids, torch.arange(2))[tokens]
    values = torch.randn(2, 5, dtype=dtype, requires_grad=True)
    direction = torch.randn(3, 40, 5, dtype=dtype)
    whole = weight.double().index_copy(0, ids, values.detach().double()).requires_grad_()
    embedded = F.embedding(tokens, weight).requires_grad_()
    found = replace_rows(embedded, values, positions)
    assert torch.equal(found.double(), F.embedding(tokens, whole))
    found.backward(direction)
    F.embedding(tokens, whole).backward(direction.double())
    assert whole.grad is not None
    rounding = 1e-12 if dtype == torch.float64 else 2**-8
    torch.testing.assert_close(values.grad.double(), whole.grad[ids], rtol=rounding, atol=1e-12)
    assert torch.equal(embedded.grad, direction * (positions == 2)[..., None]), "a replaced row has no part"


def test_gradients_agree_with_finite_differences() -> None:
    hidden, weight, bias, labels = case(6, 5, 7, torch.float64)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, labels, bias, softcap=3.0, logit_scale=0.5, chunk=2)

    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))


def test_bfloat16_loses_only_what_its_logits_lose() -> None:
    hidden, weight, _, labels = case(200, 64, 500, torch.bfloat16)
    loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward()
    exact = double(hidden), double(weight)
    expected = reference(*exact, labels, None, None, 1.0)
    expected.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=2e-3)
    for found, wanted in zip((hidden, weight), exact, strict=True):
        assert found.grad.dtype == torch.bfloat16
        assert (found.grad.double() - wanted.grad).norm() < 0.01 * wanted.grad.norm()


def test_the_whole_logits_are_never_in_memory() -> None:
    tokens, width, vocabulary, chunk = 512, 16, 1000, 32
    hidden, weight, _, labels = case(tokens, width, vocabulary)
    with Recorder() as recorder:
        linear_cross_entropy(hidden, weight.detach(), labels, chunk=chunk).backward()
    assert recorder.largest == chunk * vocabulary < tokens * vocabulary / 10


@pytest.mark.parametrize(
    ("vocabulary", "tokens"), [(2_048, 1024), (32_000, 1024), (128_256, 512), (256_000, 256), (2**20, 128)]
)
def test_chunks_are_smaller_for_a_large_vocabulary(vocabulary: int, tokens: int) -> None:
    """A chunk has at most 256 MiB of fp32 logits, but at least 128 tokens."""
    assert tokens_at_once(vocabulary) == tokens
    assert tokens == 128 or 4 * tokens * vocabulary <= 2**28


def test_a_frozen_head_takes_two_products_and_an_evaluation_one() -> None:
    hidden, weight, _, labels = case(64, 8, 30)
    with Recorder() as recorder:
        linear_cross_entropy(hidden, weight.detach(), labels).backward()
    assert recorder.products == 2
    with torch.no_grad(), Recorder() as recorder:
        linear_cross_entropy(hidden, weight, labels)
    assert recorder.products == 1


def test_ignored_tokens_never_reach_the_head() -> None:
    hidden, weight, _, labels = case(30, 8, 20)
    ignored = labels == IGNORE_INDEX
    spoiled = hidden.detach().masked_fill(ignored[:, None], float("nan")).requires_grad_()
    loss = linear_cross_entropy(spoiled, weight, labels)
    loss.backward()
    assert torch.equal(loss, linear_cross_entropy(hidden, weight, labels))
    assert not spoiled.grad[ignored].any()
    assert spoiled.grad[~ignored].any(dim=1).all()
    assert weight.grad.isfinite().all()


def test_the_loss_is_zero_without_labels() -> None:
    hidden, weight, _, labels = case(5, 8, 20)
    loss = linear_cross_entropy(hidden, weight, torch.full_like(labels, IGNORE_INDEX))
    loss.backward()
    assert loss.item() == 0
    assert not hidden.grad.any()


def test_large_logits_do_not_overflow() -> None:
    hidden = torch.tensor([[1000.0], [-1000.0]], requires_grad=True)
    loss = linear_cross_entropy(hidden, torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 0]))
    loss.backward()
    assert loss.item() == 2000
    assert hidden.grad.flatten().tolist() == [0, -2]


def test_the_head_gets_a_gradient_only_if_it_is_trained() -> None:
    hidden, weight, _, labels = case(10, 8, 20)
    linear_cross_entropy(hidden, weight.detach(), labels).backward()
    assert hidden.grad is not None
    assert weight.grad is None
    linear_cross_entropy(hidden.detach(), weight, labels).backward()
    assert weight.grad is not None
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, labels).requires_grad


def test_autocast_computes_in_its_dtype() -> None:
    hidden, weight, bias, labels = case(10, 8, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels, bias)
        loss.backward()
    assert torch.equal(loss, linear_cross_entropy(hidden.bfloat16(), weight, labels, bias))
    assert loss.dtype == hidden.grad.dtype == weight.grad.dtype == torch.float32


def test_fake_tensors_need_only_the_number_of_labels() -> None:
    hidden, weight, _, labels = case(10, 8, 20)
    supervised = int((labels != IGNORE_INDEX).sum())
    known = linear_cross_entropy(hidden, weight, labels, supervised=supervised)
    assert torch.equal(known, linear_cross_entropy(hidden, weight, labels))
    with FakeTensorMode():
        fake = torch.empty(10, 8, requires_grad=True)
        labels = torch.zeros(10, dtype=torch.int64)
        linear_cross_entropy(fake, torch.empty(20, 8), labels, supervised=7, chunk=4).backward()
        assert fake.grad.shape == (10, 8)
