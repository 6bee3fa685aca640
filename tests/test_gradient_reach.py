"""Layers that learn nothing are found by their gradients."""

import torch
from torch import Tensor, nn

import qlora
from qlora.adapter.gradient_reach import without_gradient
from qlora.adapter.lora_spec import LoraSpec
from qlora.adapter.trained_rows import place_rows


class Indexed(nn.Module):
    """Weighs its input by a choice that it makes without gradients, and leaves one layer out."""

    def __init__(self) -> None:
        super().__init__()
        self.index, self.value, self.unused = (nn.Linear(4, 4) for _ in range(3))
        self.words = nn.Embedding(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        """Return [N, 4] for ids [N]."""
        x = self.words(ids)
        with torch.no_grad():
            chosen = self.index(x) > 0
        out: Tensor = self.value(x) * chosen
        return out


def test_layers_under_no_grad_and_layers_never_called_have_no_gradient() -> None:
    model = qlora.adapt(Indexed(), LoraSpec(rank=2, targets=["index", "value", "unused"]))
    model(torch.arange(8)).square().sum().backward()
    assert without_gradient(model) == ["index", "unused"]


def test_rows_of_tokens_that_a_batch_does_not_have_are_no_finding() -> None:
    model = Indexed()
    model.index.requires_grad_(requires_grad=False)
    place_rows(model, {"words": ([6], nn.Parameter(torch.zeros(1, 4)))})
    model(torch.arange(4)).square().sum().backward()
    assert not model.words.rows.values.grad.any()
    assert without_gradient(model) == ["unused"]
