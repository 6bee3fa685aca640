"""Fused ops: plain torch against fp64, Triton kernels against plain torch, and the choice between the two.

Without a GPU the kernels run in Triton's interpreter (see conftest.py), which executes them block by block in numpy.
"""

import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from qlora.kernels import cross_entropy, dispatch, gate, grouped, norm, rotary, triton_kernels
from qlora.kernels.dispatch import FusedOp
from qlora.quantization import nf4
from qlora.quantization.expert_stack import ExpertStack, quantize
from qlora.runtime.fake import representing_cuda

pytest.importorskip("triton", reason="no Triton for this platform")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PASSES = {
    "silu_product": gate.SILU_PRODUCT,
    "silu_gradients": gate.SILU_GRADIENTS,
    "normalize": norm.NORMALIZE,
    "normalize late": norm.NORMALIZE_LATE,
    "normalize_gradient": norm.NORMALIZE_GRADIENT,
    "rotate": rotary.ROTATE,
    "rotate pairs": rotary.ROTATE_PAIRS,
    "loss": cross_entropy.LOSS,
    "grouped_product": grouped.PRODUCT,
    "grouped_outer": grouped.OUTER,
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TARGETS = ("80", "86", "89", "90", "120")
"""compute capabilities: A100, RTX 30, RTX 40 and L4, H100 and H200, RTX 50"""


def spans(*ends: int) -> grouped.Spans:
    return grouped.Spans(ends, torch.tensor(ends, device=DEVICE))


@pytest.fixture(autouse=DEVICE == "cpu")
def products_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter multiply tiles in bfloat16: it keeps them as integers, and multiplies these."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    multiply = InterpreterBuilder.create_dot

    def widened(tile: Any) -> Any:
        if tile.dtype.scalar != tl.bfloat16:
            return tile
        return TensorHandle((tile.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    monkeypatch.setattr(
        InterpreterBuilder,
        "create_dot",
        lambda self, a, b, *more: multiply(self, widened(a), widened(b), *more),
    )


@pytest.fixture
def as_on_a_gpu() -> Iterator[None]:
    """Treat the tensors of the test as tensors on a GPU."""
    with representing_cuda():
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PASSES)
def test_a_kernel_gives_the_results_of_the_plain_form(name: str, dtype: torch.dtype) -> None:
    work = PASSES[name]
    assert work.kernel == name.split()[0]
    assert work.difference(torch.device(DEVICE), dtype) is None


CASES: dict[str, Callable[[torch.dtype], tuple[Any, ...]]] = {
    # Shapes that the proofs' examples lack: one row, one column, several blocks, no residual, no cap
    "silu_product": lambda dtype: tuple(random(dtype, 3, 4100, seed=s) for s in range(3)),
    "silu_gradients": lambda dtype: tuple(random(dtype, 1, 1, seed=s) for s in range(4)),
    "normalize": lambda dtype: (random(dtype, 5, 3, 128), random(dtype, 128, seed=1), 1e-6, random(dtype, 5, 3, 128)),
    "normalize late": lambda dtype: (
        random(dtype, 3, 96), random(dtype, 96, seed=1), 1e-6, random(dtype, 3, 96), 1.0, True
    ),
    "normalize_gradient": lambda dtype: (
        random(dtype, 1, 4099), random(dtype, 1, 4099, seed=1), random(dtype, 4099, seed=2), 1e-6, None
    ),
    "rotate": lambda dtype: (
        random(dtype, 3, 5, 6, 16), *angles(dtype, 1, 5, 16), 1, torch.empty(3, 5, 6, 16, dtype=dtype, device=DEVICE),
        False,
    ),
    "rotate pairs": lambda dtype: (
        random(dtype, 3, 5, 6, 16), *(x[..., [0, 8, 1, 9, 2, 10]] for x in angles(dtype, 1, 5, 16)), 1,
        torch.empty(3, 5, 6, 16, dtype=dtype, device=DEVICE), True,
    ),
    "loss": lambda dtype: (
        logits := random(dtype, 4, 9000) * 5, torch.tensor([0, 8999, 4096, 5], device=DEVICE), None, 1.0,
        logits, torch.empty(4, dtype=dtype, device=DEVICE),
    ),
    "grouped_product": lambda dtype: (  # one group, wide, of a matrix as it is stored
        random(dtype, 5, 200), random(dtype, 1, 200, 300, seed=1), spans(5), random(dtype, 5, 300), False, 1.0
    ),
    "grouped_outer": lambda dtype: (
        random(dtype, 200, 70), random(dtype, 200, 20, seed=1), spans(0, 200), random(dtype, 2, 70, 20), 1.0
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PASSES)
def test_a_kernel_is_right_at_other_shapes(name: str, dtype: torch.dtype) -> None:
    plain = PASSES[name]
    other = FusedOp(plain.plain, plain.kernel, lambda device, dtype: CASES[name](dtype))
    assert other.difference(torch.device(DEVICE), dtype) is None


def test_the_gradient_of_a_loss_is_computed_only_if_wanted() -> None:
    logits, targets = random(torch.float32, 6, 700) * 3, torch.arange(6, device=DEVICE)
    expected = F.softmax(logits.double(), dim=1) - F.one_hot(targets, 700)
    losses = F.cross_entropy(logits.double(), targets, reduction="none")
    for form in (cross_entropy.LOSS.plain, cross_entropy.LOSS.in_triton):
        gradient = torch.empty(6, 700, dtype=torch.bfloat16, device=DEVICE)
        for wanted in (gradient, None):
            found = torch.empty(6, device=DEVICE)
            form(logits.clone(), targets, None, 1.0, wanted, found)
            torch.testing.assert_close(found.double(), losses, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient.double(), expected, atol=2e-4, rtol=1e-2)


@pytest.mark.parametrize("shape", [(130, 300), (64, 64), (3, 4096), (1, 2)])
@pytest.mark.parametrize("block_size", [64, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_launch_dequantizes_to_the_same_bits(
    shape: tuple[int, int], block_size: int, dtype: torch.dtype
) -> None:
    weight = nf4.quantize(random(torch.float32, *shape), block_size)
    state = weight.quant_state
    codes, inner = weight.detach().view(torch.uint8).reshape(-1), state.state2
    tables = inner.absmax, inner.code, state.offset, state.code
    given = codes, state.absmax, *tables, block_size, inner.blocksize
    out, expected = (torch.full(shape, torch.nan, dtype=dtype, device=DEVICE) for _ in range(2))
    nf4.DEQUANTIZE.in_triton(out, *given)
    if DEVICE == "cuda":
        nf4.DEQUANTIZE.plain(expected, *given)
    else:
        expected = nf4.dequantize(weight, state, dtype)
    # The interpreter truncates to bfloat16 where real hardware rounds: the last of the 8 bits may differ there
    cut = DEVICE == "cpu" and dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=2**-7 if cut else 0, atol=0)


@pytest.mark.parametrize(("shape", "block_size"), [((24, 64), 64), ((8, 2112), 64), ((32, 64), 256)])
def test_one_launch_dequantizes_the_matrices_of_several_experts(
    shape: tuple[int, int], block_size: int
) -> None:
    """Each has its own statistics, whose blocks of 256 it does not fill."""
    packed = quantize(random(torch.float32, 3, *shape), block_size)
    stack = ExpertStack(packed)
    out = torch.full((3, *shape), torch.nan, device=DEVICE)
    assert packed.scales is not None
    nf4.DEQUANTIZE.in_triton(
        out, packed.codes, packed.absmax, packed.scales, stack.table, packed.offsets, stack.code, block_size,
        nf4.STATISTICS_BLOCK_SIZE,
    )  # fmt: skip
    assert torch.equal(out, torch.stack([stack.matrix(expert, torch.float32) for expert in range(3)]))
    assert torch.equal(out[1:], stack.matrices(slice(1, 3), torch.float32))


@pytest.mark.parametrize(
    ("activation", "reference"),
    [(gate.SILU, F.silu), (gate.GELU_TANH, partial(F.gelu, approximate="tanh"))],
    ids=["silu", "gelu_tanh"],
)
def test_gates_agree_with_autograd_in_fp64(
    activation: gate.Activation, reference: Callable[[Tensor], Tensor]
) -> None:
    a, b, c = (random(torch.float64, 5, 24, seed=s).requires_grad_() for s in range(3))
    product = reference(a) * b
    activation.product(a.detach(), b.detach(), found := torch.empty_like(a))
    torch.testing.assert_close(found, product)
    expected = torch.autograd.grad(product, (a, b), c)
    d_gate, d_up = c.detach().clone(), torch.empty_like(c)
    activation.gradients(a.detach(), b.detach(), d_gate, d_up)
    torch.testing.assert_close((d_gate, d_up), expected)


@pytest.mark.parametrize("rounds_late", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms_agree_with_autograd_in_fp64(offset: float, rounds_late: bool) -> None:
    a, b, c = (random(torch.float64, 5, 24, seed=s).requires_grad_() for s in range(3))
    weight = random(torch.float64, 24, seed=3)
    normal = F.rms_norm(a, (24,), weight + offset, 1e-5)
    torch.testing.assert_close(norm.normalize(a.detach(), weight, 1e-5, offset, rounds_late), normal)
    (expected_dx,) = torch.autograd.grad(normal, a, c)
    dx = c.detach().clone()
    norm.normalize_gradient(dx, a.detach(), weight, 1e-5, offset, residual=b.detach())
    torch.testing.assert_close(dx, expected_dx + b)


def test_a_norm_rounds_before_or_after_its_weight() -> None:
    x, weight = random(torch.bfloat16, 5, 24), random(torch.bfloat16, 24, seed=3)
    unit = x.float() * (x.float().square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    assert torch.equal(norm.normalize(x, weight, 1e-5, 0.0, False), unit.bfloat16() * weight)
    assert torch.equal(norm.normalize(x, weight, 1e-5, 1.0, True), (unit * (1 + weight.float())).bfloat16())


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_proven_kernel_takes_the_place_of_the_plain_form() -> None:
    work = FusedOp(gate.SILU_PRODUCT.plain, "silu_product", gate.SILU_PRODUCT.example)
    x = random(torch.float32, 4, 40)
    out = torch.empty_like(x)
    work(x, x, out)  # proves the kernel on its first use
    work.plain = forbidden
    work(x, x, out)
    torch.testing.assert_close(out, F.silu(x) * x)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("kernel", ["silu_product", "no_such_kernel"])
def test_a_wrong_or_missing_kernel_is_reported_once_and_not_used(kernel: str) -> None:
    work = FusedOp(plus, kernel, gate.SILU_PRODUCT.example)
    x = random(torch.float32, 4, 40)
    out = torch.empty_like(x)
    with pytest.warns(
        UserWarning, match=f"the kernel {kernel} does not run correctly on {DEVICE}.*QLORA_KERNELS=off"
    ):
        work(x, x, out)
    assert torch.equal(out, x + x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        work(x, x, out)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_kernel_that_fails_at_the_real_shapes_is_no_longer_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof uses small shapes; a compiler may refuse larger ones."""

    def compiled_for_few_rows(a: Tensor, b: Tensor, out: Tensor) -> None:
        if len(a) > 100:
            raise RuntimeError("out of resources")
        plus(a, b, out)

    monkeypatch.setattr(triton_kernels, "plus", compiled_for_few_rows, raising=False)
    work = FusedOp(plus, "plus", gate.SILU_PRODUCT.example)
    x = random(torch.float32, 101, 4)
    out = torch.empty_like(x)
    with pytest.warns(UserWarning, match="the kernel plus .*RuntimeError: out of resources"):
        work(x, x, out)
    assert torch.equal(out, x + x)
    work(x, x, out)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_an_exact_kernel_must_agree_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setattr(
        triton_kernels, "plus", lambda a, b, out: out.copy_((a + b) * (1 + 1e-6)), raising=False
    )
    device, dtype = torch.device(DEVICE), torch.float32
    assert FusedOp(plus, "plus", gate.SILU_PRODUCT.example).difference(device, dtype) is None
    assert FusedOp(plus, "plus", gate.SILU_PRODUCT.example, exact=True).difference(device, dtype)
    assert nf4.DEQUANTIZE.exact


def test_kernels_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_KERNELS", "off")
    x = random(torch.float32, 2)
    out = torch.empty_like(x)
    with representing_cuda():
        FusedOp(plus, "no_such_kernel", gate.SILU_PRODUCT.example)(x, x, out)
    assert torch.equal(out, x + x)


def test_a_forecast_for_a_gpu_counts_no_temporaries_of_a_fused_op() -> None:
    with FakeTensorMode(), representing_cuda():
        x = torch.empty(8, 64)
        y = norm.normalize(x, torch.empty(64), 1e-5)
        assert y.shape == x.shape


def plus(a: Tensor, b: Tensor, out: Tensor) -> None:
    out.copy_(a + b)


def forbidden(*_: Any) -> None:
    raise AssertionError("the plain form was used")


def random(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    return dispatch.numbers(torch.device(DEVICE), dtype, *shape, seed=seed)


def angles(dtype: torch.dtype, *shape: int) -> tuple[Tensor, Tensor]:
    half = random(torch.float32, *shape[:-1], shape[-1] // 2, seed=1).repeat(1, 1, 2)
    return half.cos().to(dtype), half.sin().to(dtype)


def machine_code(*arguments: str, cache: Path) -> list[list[str]]:
    """Return the lines of `kernels_for_tests.py`, in words."""
    command = [sys.executable, str(Path(__file__).with_name("kernels_for_tests.py")), *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    out = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert out.returncode == 0, out.stderr
    return [line.split() for line in out.stdout.splitlines()]


def test_every_kernel_compiles_to_a_gpu_s_machine_code(tmp_path: Path) -> None:
    """Triton includes its compiler, so kernels that have not run on a GPU here at least compile for one."""
    lines = machine_code("90", cache=tmp_path)
    assert {name for name, *_ in lines} == kernels_of_the_package()
    assert len(lines) == 11 + 5
    assert all(int(size) > 1000 for *_, size in lines)


@pytest.mark.slow
def test_every_kernel_compiles_for_every_gpu_and_dtype(tmp_path: Path) -> None:
    lines = machine_code("--every-dtype", *TARGETS, cache=tmp_path)
    assert {target for _, _, target, _ in lines} == set(TARGETS)
    for target in TARGETS:
        assert {name for name, _, at, _ in lines if at == target} == kernels_of_the_package()
        assert {dtype for _, dtype, at, _ in lines if at == target} == {"bfloat16", "float16", "float32"}
    assert len(lines) == len(TARGETS) * len(DTYPES) * (11 + 5)
    assert all(int(size) > 1000 for *_, size in lines)


def kernels_of_the_package() -> set[str]:
    """Return the names of the kernels that a launcher of the package launches."""
    source = Path(triton_kernels.__file__).read_text()
    return set(re.findall(r"^        (_\w+)\[", source, re.MULTILINE))
