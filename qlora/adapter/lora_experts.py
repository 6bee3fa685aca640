"""LoRA on a projection of all experts of a layer: expert e computes W_e x + scaling * B_e A_e x.

A and B have PEFT's layout for `target_parameters`, see `peft_experts`. Each expert starts from its own random A_e. Its
rank is usually lower than that of other layers, see `LoraSpec.expert_rank`.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qlora.adapter.adapted_layer import AdaptedLayer
from qlora.adapter.lora_spec import LoraSpec
from qlora.adapter.low_rank_layer import LowRankLayer, initial_a
from qlora.adapter.peft_experts import split
from qlora.adapter.peft_tensors import SUFFIX_A, SUFFIX_B
from qlora.errors import ModelError
from qlora.ops.dropout import draw
from qlora.ops.expert_product import Projection
from qlora.ops.products import Update
from qlora.quantization.expert_stack import ExpertStack
from qlora.quantization.nf4 import assert_frozen


def projection_of(stack: ExpertStack) -> Projection:
    """Return the argument of `qlora.ops.experts` for a projection without an adapter."""
    assert_frozen(stack.weight, stack.bias)
    return Projection(stack.matrices, stack.experts, stack.out_features, stack.in_features, stack.bias)


class LoRAExperts(LowRankLayer):
    """A frozen projection of all experts of a layer with a trainable low-rank update of each.

    Args:
        base: the matrices, dense or in NF4; frozen in place.
        spec: rank, alpha, dropout, scaling, initialisation and dtype; None means the defaults of `LoraSpec`.
        generator: CPU generator that A is drawn from; None means torch's default generator.

    Raises:
        ModelError: `base` is no projection of experts.
    """

    SAVED: ClassVar = {SUFFIX_A: "lora_a", SUFFIX_B: "lora_b"}
    base: ExpertStack

    def __init__(
        self, base: nn.Module, spec: LoraSpec | None = None, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(base, spec)
        device, rank, experts = self.base.weight.device, self.spec.rank, self.base.experts
        one = rank, self.base.in_features
        a = torch.cat([initial_a(self.spec.init, one, device, generator) for _ in range(experts)])
        self.lora_a = nn.Parameter(a.to(device, self.spec.dtype))
        self.lora_b = nn.Parameter(
            torch.zeros(self.base.out_features, rank * experts, device=device, dtype=self.spec.dtype)
        )

    @classmethod
    def adapts(cls, module: nn.Module) -> bool:
        """Return True for projections of experts."""
        return isinstance(module, ExpertStack)

    @classmethod
    def why_unsuitable(cls, base: nn.Module) -> str | None:
        """Return why `base` is no projection of experts; None if it is one."""
        return None if cls.adapts(base) else "it is no projection of experts; target a linear layer"

    @classmethod
    def shapes(cls, module: nn.Module, spec: LoraSpec) -> dict[str, tuple[int, ...]]:
        """Return the shapes of A [E * rank, in] and B [out, rank * E]."""
        stack: Any = module.base if isinstance(module, AdaptedLayer) else module
        width = spec.rank * stack.experts
        return {SUFFIX_A: (width, stack.in_features), SUFFIX_B: (stack.out_features, width)}

    def product(self) -> tuple[Projection, Update]:
        """Return the arguments of `qlora.ops.experts`, with the next dropout mask if the layer is training."""
        dropout = draw(self.dropout if self.training else 0.0, self.number)
        projection = projection_of(self.base)._replace(scaling=self.scaling, dropout=dropout)
        return projection, Update(self.lora_a, self.lora_b)

    def factors(self, expert: int) -> tuple[Tensor, Tensor]:
        """Return A_e [rank, in] and B_e [out, rank] of one expert, detached."""
        a, b = split(self.lora_a.detach(), self.lora_b.detach(), self.base.experts)
        return a[expert], b[expert]

    def merged_matrix(self, expert: int, matrix: Tensor) -> Tensor:
        """Return the dense matrix [out, in] of an expert plus its update, in fp32, or fp64 if an operand is fp64."""
        a, b = self.factors(expert)
        wide = torch.float64 if torch.float64 in (matrix.dtype, a.dtype, b.dtype) else torch.float32
        matrix, a, b = (tensor.to(matrix.device, wide) for tensor in (matrix, a, b))
        return torch.addmm(matrix, b, a, alpha=self.scaling)

    def merged_weight(self, weight: Tensor | None = None) -> Tensor:
        """Return all matrices plus their updates as the model stores them: [E, out, in], or [E, in, out] if transposed.

        weight: dense matrices to add the updates to, as stored; None means the layer's own.
        """
        base = self.base
        merged = []
        for expert in range(base.experts):
            if weight is None:
                matrix = base.matrix(
                    expert, torch.float64 if self.lora_a.dtype == torch.float64 else torch.float32
                )
            else:
                matrix = weight[expert].T if base.transposed else weight[expert]
            one = self.merged_matrix(expert, matrix)
            merged.append(one.T if base.transposed else one)
        return torch.stack(merged)

    def forward(self, *_: Any) -> Tensor:
        """Raise an error: the module of the experts reads `product`."""
        raise ModelError("the model calls the projection of experts by itself, which qlora does not support")
