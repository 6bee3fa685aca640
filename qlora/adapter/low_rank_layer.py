"""The part that all LoRA layers share: the settings, and the initial numbers of A."""

import math

import torch
from torch import Tensor, nn

from qlora.adapter.adapted_layer import AdaptedLayer
from qlora.adapter.lora_spec import FROM_WEIGHTS, LoraSpec
from qlora.errors import UsageError
from qlora.quantization.nf4 import QuantState, dense


class LowRankLayer(AdaptedLayer):
    """A frozen layer with the trained update scaling * B A of its weight (LoRA, Hu et al. 2021, equation 3)."""

    changes_weight = True
    spec: LoraSpec
    lora_a: nn.Parameter
    lora_b: nn.Parameter

    @property
    def rank(self) -> int:
        """Rank of the update: rows of A, columns of B."""
        return self.spec.rank

    @property
    def alpha(self) -> float:
        """Numerator of the scaling in PEFT's config, alpha/rank or alpha/sqrt(rank)."""
        return self.spec.numerator

    @property
    def scaling(self) -> float:
        """Factor of the update B A x."""
        return self.spec.factor

    @property
    def dropout(self) -> float:
        """Share of A's input that is dropped in training."""
        return self.spec.dropout

    def __init__(
        self, base: nn.Module, spec: LoraSpec | None = None, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(base, spec or LoraSpec())

    def why_incompatible(self, spec: LoraSpec) -> str | None:
        """Return why the layer cannot load tensors of another rank; None if the rank is the same."""
        if spec.rank == self.rank:
            return None
        return f"has rank {spec.rank} in the file and {self.rank} in the model: load it into a model without an adapter"

    def extra_repr(self) -> str:
        """Return the layer's settings for print(model)."""
        alpha = self.spec.resolved_alpha
        return f"rank={self.rank}, alpha={alpha:g}, scaling={self.scaling:g}, dropout={self.dropout:g}"

    def wide(self, weight: Tensor, state: QuantState | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return `weight`, A and B for a sum: dense and detached, in fp64 if one of them is fp64, else in fp32."""
        tensors = weight, self.lora_a, self.lora_b
        dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
        a, b = (tensor.detach().to(weight.device, dtype) for tensor in (self.lora_a, self.lora_b))
        return dense(weight, state, dtype), a, b


def initial_a(
    init: str, shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None
) -> Tensor:
    """Return the initial A [rank, ...] in fp32, drawn on the CPU so that all devices start from the same numbers."""
    if device.type == "meta":
        return torch.empty(shape, device=device)
    if init == "zero":
        return torch.zeros(shape)
    a = torch.empty(shape)
    if init == "gaussian":
        return a.normal_(0.0, 1 / shape[0], generator=generator)
    if init == "orthogonal":
        return nn.init.orthogonal_(a, generator=generator)
    if init in FROM_WEIGHTS:
        raise UsageError(
            f"init {init} needs the weights of a model: use adapt(model, LoraSpec(init={init!r}))"
        )
    bound = 1 / math.sqrt(math.prod(shape[1:]))
    return a.uniform_(-bound, bound, generator=generator)
