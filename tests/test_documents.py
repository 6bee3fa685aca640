"""Recomputes the LoRA documents: the numerical example in exact arithmetic, and the parameter counts."""

from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from qlora.adapter import LoRALinear, LoraSpec, adapt, lora_parameter_count, trainable_parameters

Matrix = list[list[Fraction]]


def exact(*rows: str) -> Matrix:
    """Return a matrix of fractions, written as rows of decimals."""
    return [[Fraction(number) for number in row.split()] for row in rows]


W = exact("1 0 -1 2", "0 1 1 -1", "2 -2 0 0", "1 1 1 1")
A = exact(".1 .2 .3 .4", "-.1 -.2 0 .1")
B = exact("1 0", "0 1", ".5 -.5", "-1 1")
X = exact("1 0 0 0")
TARGET = exact("1 1 1 1")
RATE = Fraction("0.1")


def product(a: Matrix, b: Matrix) -> Matrix:
    return [
        [
            sum((x * y for x, y in zip(row, column, strict=True)), Fraction(0))
            for column in zip(*b, strict=True)
        ]
        for row in a
    ]


def add(a: Matrix, b: Matrix, factor: Fraction = Fraction(1)) -> Matrix:
    return [[x + factor * y for x, y in zip(*rows, strict=True)] for rows in zip(a, b, strict=True)]


def transposed(a: Matrix) -> Matrix:
    return [list(column) for column in zip(*a, strict=True)]


def tensor(a: Matrix) -> Tensor:
    return torch.tensor([[float(number) for number in row] for row in a], dtype=torch.float64)


def test_the_numerical_example_in_exact_arithmetic() -> None:
    """The lecture note's example: y = x (W + B A), row vectors, L = sum((y - t)^2) / 2.

    The printed loss of 2.75 is right. Two gradients are misprinted: dL/dA has .2 instead of -.8 (row 0, column 1), and
    dL/dB has four nonzero rows, although only row 0 can have a gradient (x selects row 0). The values after the update
    follow from them.
    """
    error = add(product(X, add(W, product(B, A))), TARGET, Fraction(-1))
    loss = sum(e * e for e in error[0]) / 2
    gradient_b = product(product(transposed(X), error), transposed(A))
    gradient_a = product(transposed(product(X, B)), error)
    assert loss == Fraction("2.75")
    assert gradient_a == exact(".1 -.8 -1.7 1.4", "0 0 0 0")
    assert gradient_b == exact("-.10 .29", "0 0", "0 0", "0 0")
    assert add(A, gradient_a, -RATE)[0] == exact(".09 .28 .47 .26")[0]
    assert add(B, gradient_b, -RATE)[0] == exact("1.01 -.029")[0]


def test_our_layer_computes_the_numerical_example() -> None:
    """Our layer uses column vectors: its weight is W^T, its A is the note's B^T, and its B is the note's A^T."""
    linear = nn.Linear(4, 4, bias=False, dtype=torch.float64)
    linear.weight.data = tensor(transposed(W))
    layer = LoRALinear(linear, LoraSpec(rank=2, dtype=torch.float64))
    layer.lora_a.data, layer.lora_b.data = tensor(transposed(B)), tensor(transposed(A))
    loss = (layer(tensor(X)) - tensor(TARGET)).square().sum() / 2
    loss.backward()
    close = {"rtol": 0, "atol": 1e-15}
    torch.testing.assert_close(loss, torch.tensor(2.75, dtype=torch.float64), **close)
    torch.testing.assert_close(layer.lora_b.grad, tensor(exact(".1 -.8 -1.7 1.4", "0 0 0 0")).T, **close)
    torch.testing.assert_close(layer.lora_a.grad, tensor(exact("-.10 .29", "0 0", "0 0", "0 0")).T, **close)
    torch.optim.SGD(trainable_parameters(layer).values(), lr=float(RATE)).step()
    torch.testing.assert_close(layer.lora_b[:, 0], tensor(exact(".09 .28 .47 .26"))[0], **close)
    torch.testing.assert_close(layer.lora_a[:, 0], tensor(exact("1.01 -.029"))[0], **close)
    assert torch.equal(linear.weight, tensor(transposed(W)))


def test_the_counts_of_the_documents() -> None:
    assert lora_parameter_count(4096, 4096, rank=8) == 65_536
    assert 4096 * 4096 / 65_536 == 256, "the document rounds to 257"
    assert lora_parameter_count(5_000, 10_000, rank=8) == 120_000 == 40_000 + 80_000
    hundred = 100 * lora_parameter_count(4096, 4096, rank=8)
    assert round(hundred / 1e6, 2) == 6.55
    assert round(100 * hundred / 7e9, 3) == 0.094


@pytest.mark.parametrize(
    ("out_features", "in_features", "count"), [(4096, 4096, 65_536), (5_000, 10_000, 120_000)]
)
def test_a_layer_has_as_many_parameters_as_it_counts(out_features: int, in_features: int, count: int) -> None:
    layer = LoRALinear(nn.Linear(in_features, out_features, device="meta"), LoraSpec(rank=8))
    assert sum(p.numel() for p in trainable_parameters(layer).values()) == count


LLAMAS = [  # hidden, intermediate, layers, heads; trainable for attention at rank 8, all-linear at rank 64
    ("7B", 4096, 11008, 32, 32, 8_388_608, 159_907_840),
    ("13B", 5120, 13824, 40, 40, 13_107_200, 250_347_520),
    ("33B", 6656, 17920, 60, 52, 25_559_040, 487_587_840),
    ("65B", 8192, 22016, 80, 64, 41_943_040, 799_539_200),
]


@pytest.mark.parametrize(
    ("hidden", "middle", "layers", "heads", "attention", "everything"),
    [m[1:] for m in LLAMAS],
    ids=[m[0] for m in LLAMAS],
)
def test_trainable_parameters_of_the_llamas(
    hidden: int, middle: int, layers: int, heads: int, attention: int, everything: int
) -> None:
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=middle,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=32_000,
    )
    closed_form = {
        ("attention", 8): layers * 4 * 8 * 2 * hidden,
        ("all-linear", 64): layers * 64 * (4 * 2 * hidden + 3 * (hidden + middle)),
    }
    assert list(closed_form.values()) == [attention, everything]
    for (targets, rank), expected in closed_form.items():
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        adapt(model, LoraSpec(targets=targets, rank=rank))
        assert sum(p.numel() for p in trainable_parameters(model).values()) == expected
