"""Experts of a mixture: the product with its gradients, against a plain loop in fp64 and against transformers."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora.adapter.experts import ConcatenatedGate, OwnGate, product
from qlora.adapter.lora_experts import LoRAExperts
from qlora.adapter.lora_spec import LoraSpec
from qlora.ops import sorted_pairs
from qlora.ops.experts import Experts, mixture
from qlora.ops.mlp import Forward
from qlora.ops.sorted_pairs import SortedPairs
from qlora.quantization.expert_stack import ExpertStack

TOKENS, CHOICES, EXPERTS, WIDTH, INNER = 11, 2, 5, 24, 12
EMPTY = 3
"""expert that gets no token"""


class Clamped(nn.Module):
    """gpt-oss's gate: interleaved, clamped, with a shifted up."""

    has_gate = True

    def _apply_gate(self, wide: Tensor) -> Tensor:
        gate, up = wide[..., ::2].clamp(max=2.0), wide[..., 1::2].clamp(-2.0, 2.0)
        return (up + 1) * gate * torch.sigmoid(gate * 1.7)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def routing() -> tuple[Tensor, Tensor]:
    """Return choices [N, K], never the expert EMPTY, and their weights."""
    generator = torch.Generator().manual_seed(5)
    allowed = torch.tensor([e for e in range(EXPERTS) if e != EMPTY])
    rows = [allowed[torch.randperm(len(allowed), generator=generator)[:CHOICES]] for _ in range(TOKENS)]
    return torch.stack(rows), numbers(TOKENS, CHOICES, seed=9).abs()


def stacks(kind: str) -> list[ExpertStack]:
    """Return W_wide and W_down: dense, or as [in, out] with biases, or in NF4."""
    shapes = [(2 * INNER, WIDTH), (WIDTH, INNER)]
    made = []
    for seed, (rows, columns) in enumerate(shapes):
        transposed = kind == "transposed"
        weight = numbers(EXPERTS, *((columns, rows) if transposed else (rows, columns)), seed=seed)
        bias = numbers(EXPERTS, rows, seed=seed + 20) if transposed else None
        stack = ExpertStack(weight, bias, transposed=transposed)
        made.append(stack.quantized(64, double_quant=kind == "nf4") if "nf4" in kind else stack)
    return made


def adapted(stack: ExpertStack, dropout: float) -> LoRAExperts:
    layer = LoRAExperts(stack, LoraSpec(rank=3, alpha=6, dropout=dropout, dtype=torch.float64))
    layer.lora_b.data = numbers(*layer.lora_b.shape, seed=31) / 4
    layer.number = stack.in_features
    return layer


def in_a_loop(
    hidden: Tensor, choices: Tensor, weights: Tensor, layers: list[LoRAExperts], gate: Callable[[Tensor], Tensor],
    masks: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Compute the mixture token by token, from A and B in PEFT's layout."""
    rows = []
    for token in range(len(hidden)):
        total = torch.zeros_like(hidden[token])
        for choice in range(choices.shape[1]):
            expert, x = int(choices[token, choice]), hidden[token]
            for number, layer in enumerate(layers):
                low = layer.lora_a.view(EXPERTS, layer.rank, -1)[expert]
                high = layer.lora_b.view(layer.base.out_features, layer.rank, EXPERTS)[:, :, expert]
                dropped = x
                if masks is not None:
                    mask = (
                        masks[0][token] if number == 0 else masks[1].view(TOKENS, CHOICES, -1)[token, choice]
                    )
                    dropped = x * mask / (1 - layer.dropout)
                x = layer.base.matrix(expert, x.dtype) @ x + layer.scaling * (high @ (low @ dropped))
                if layer.base.bias is not None:
                    x = x + layer.base.bias[expert]
                x = gate(x) if number == 0 else x
            total = total + weights[token, choice] * x
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("group", "mode"),
    [(1, Forward.SAVE), (1, Forward.RECOMPUTE_WIDE), (2, Forward.SAVE), (5, Forward.RECOMPUTE_WIDE)],
)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", ["dense", "transposed", "nf4", "nf4 once"])
def test_outputs_and_gradients_are_those_of_a_plain_loop(
    kind: str, dropout: float, group: int, mode: Forward, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with several experts at once, in pieces that are smaller than a group, and with wide tensors not kept."""
    monkeypatch.setattr(sorted_pairs, "LEAST_ROOM", 3)
    monkeypatch.setattr(sorted_pairs, "SPREAD", 1)
    layers = [adapted(stack, dropout) for stack in stacks(kind)]
    own = OwnGate(Clamped()) if kind == "transposed" else ConcatenatedGate(nn.SiLU())
    plain = Clamped()._apply_gate if kind == "transposed" else lambda x: F.silu(x[:INNER]) * x[INNER:]
    hidden, (choices, weights) = numbers(TOKENS, WIDTH, seed=3), routing()
    inputs = [hidden.requires_grad_(), weights.requires_grad_()]
    trained = [parameter for layer in layers for parameter in (layer.lora_a, layer.lora_b)]

    (wide, up), (down, back) = (product(layer) for layer in layers)
    y = mixture(hidden, choices, weights, Experts(EXPERTS, wide, down, own, group), (up, back), mode)
    masks = None
    if dropout:
        assert wide.dropout is not None
        assert down.dropout is not None
        masks = wide.dropout.mask(hidden), down.dropout.mask(torch.empty(TOKENS, CHOICES * INNER))
    expected = in_a_loop(hidden, choices, weights, layers, plain, masks)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    probe = numbers(TOKENS, WIDTH, seed=4)
    found = torch.autograd.grad((y * probe).sum(), [*inputs, *trained])
    wanted = torch.autograd.grad((expected * probe).sum(), [*inputs, *trained])
    for one, other in zip(found, wanted, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    for layer, gradient in zip(layers, found[2::2], strict=True):
        assert not gradient.view(EXPERTS, layer.rank, -1)[EMPTY].any()


def test_a_pair_without_an_expert_adds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some routers send a token to the number after the last expert, and memory without numbers must not show."""
    empty = Tensor.new_empty
    monkeypatch.setattr(
        Tensor, "new_empty", lambda *arguments, **more: empty(*arguments, **more).fill_(torch.nan)
    )
    (wide, up), (down, back) = (product(adapted(stack, 0.0)) for stack in stacks("dense"))
    experts = Experts(EXPERTS, wide, down, ConcatenatedGate(nn.SiLU()))
    choices, weights = routing()
    none = torch.zeros(TOKENS, CHOICES, dtype=torch.bool)
    none[::3, 1] = none[4] = True

    def passed(choices: Tensor, weights: Tensor) -> list[Tensor]:
        inputs = [numbers(TOKENS, WIDTH, seed=3).requires_grad_(), weights.requires_grad_()]
        y = mixture(inputs[0], choices, weights, experts, (up, back))
        return [y, *torch.autograd.grad((y * numbers(TOKENS, WIDTH, seed=4)).sum(), inputs)]

    found = passed(choices.masked_fill(none, EXPERTS), weights.detach().clone())
    wanted = passed(choices, weights.detach().masked_fill(none, 0.0))
    torch.testing.assert_close(found[:2], wanted[:2], rtol=1e-12, atol=1e-12)
    assert not found[2][none].any()
    torch.testing.assert_close(found[2][~none], wanted[2][~none], rtol=1e-12, atol=1e-12)


def test_a_token_can_choose_an_expert_twice() -> None:
    """The tables of some routers do, so an expert can have more pairs than there are tokens."""
    layers = [adapted(stack, 0.0) for stack in stacks("nf4")]
    (wide, up), (down, back) = (product(layer) for layer in layers)
    experts = Experts(EXPERTS, wide, down, ConcatenatedGate(nn.SiLU()))
    hidden, (choices, weights) = numbers(TOKENS, WIDTH, seed=3).requires_grad_(), routing()
    choices[:9] = 1
    trained = [hidden, *(parameter for layer in layers for parameter in (layer.lora_a, layer.lora_b))]
    y = mixture(hidden, choices, weights, experts, (up, back))
    expected = in_a_loop(hidden, choices, weights, layers, lambda x: F.silu(x[:INNER]) * x[INNER:])
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    probe = numbers(TOKENS, WIDTH, seed=4)
    found = torch.autograd.grad((y * probe).sum(), trained)
    wanted = torch.autograd.grad((expected * probe).sum(), trained)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mode", [Forward.SAVE, Forward.RECOMPUTE_WIDE])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_padded_products_in_16_bits_agree_with_float32(dropout: float, mode: Forward) -> None:
    """On a CPU the rows of an expert are padded; memory without numbers and other experts' rows must not show."""
    layers = [adapted(stack, dropout) for stack in stacks("nf4")]
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)  # of the masks
        (wide, up), (down, back) = (product(layer) for layer in layers)
        hidden, (choices, weights) = numbers(TOKENS, WIDTH, seed=3).to(dtype), routing()
        inputs = [hidden.requires_grad_(), weights.to(dtype).requires_grad_()]
        experts = Experts(EXPERTS, wide, down, ConcatenatedGate(nn.SiLU()))
        y = mixture(hidden, choices, inputs[1], experts, (up, back), mode)
        trained = [parameter for layer in layers for parameter in (layer.lora_a, layer.lora_b)]
        probe = numbers(TOKENS, WIDTH, seed=4).to(dtype)
        found[dtype] = [y, *torch.autograd.grad((y * probe).sum(), [*inputs, *trained])]
    for one, other in zip(found[torch.bfloat16], found[torch.float32], strict=True):
        error = (one.double() - other.double()).norm() / other.double().norm()
        assert error < 0.02


def test_the_number_of_rows_of_products_in_16_bits_has_few_values() -> None:
    """Otherwise oneDNN generates code for each of them, which takes most of a step and fills memory."""
    choices = torch.randint(7, (300, 2), generator=torch.Generator().manual_seed(0))
    pieces = [piece for group in SortedPairs(choices, 7, 1, torch.bfloat16) for piece in group.pieces]
    assert sum(piece.size for piece in pieces) == choices.numel()
    assert {piece.rows for piece in pieces} == {128}
    assert all(piece.rows - piece.size < 64 for piece in pieces)
    few = [piece for group in SortedPairs(choices[:40], 7, 1, torch.bfloat16) for piece in group.pieces]
    assert {piece.rows for piece in few} == {16, 32}
    exact = [piece for group in SortedPairs(choices, 7, 1, torch.float32) for piece in group.pieces]
    assert all(piece.rows == piece.size for piece in exact)
