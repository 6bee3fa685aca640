"""LoRA on an embedding: row t of the table W [vocabulary, dim] becomes W_t + scaling * B A_t.

A [rank, vocabulary] has a column for each row of W, zero at the start, and B [dim, rank] is drawn from N(0, 1), as in
the reference code of LoRA (Hu et al. 2021) and in PEFT (`lora_embedding_A`, `lora_embedding_B`). A lookup has no input
to drop, so dropout does not apply. If the output head shares the weight of the embedding, the head stays as it was.
"""

from typing import Any, ClassVar, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora.adapter.adapted_layer import AdaptedLayer
from qlora.adapter.lora_spec import LoraSpec
from qlora.adapter.low_rank_layer import LowRankLayer
from qlora.adapter.peft_tensors import EMBEDDING_A, EMBEDDING_B


class LoRAEmbedding(LowRankLayer):
    """A frozen embedding with a trainable low-rank update; maps ids [...] to [..., dim] in the dtype of the table.

    Args:
        base: an `nn.Embedding` without max_norm. It is frozen in place.
        spec: the same settings as those of `LoRALinear`, without the dropout; None means the defaults of `LoraSpec`.
        generator: CPU generator that B is drawn from; None means torch's default generator.

    Raises:
        ModelError: `base` is another layer, or has max_norm.
    """

    SAVED: ClassVar = {EMBEDDING_A: "lora_a", EMBEDDING_B: "lora_b"}
    base: nn.Embedding

    def __init__(
        self, base: nn.Module, spec: LoraSpec | None = None, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(base, spec)
        device, shapes = self.base.weight.device, self.shapes(base, self.spec)
        b = torch.zeros(shapes[EMBEDDING_B], device="meta" if device.type == "meta" else "cpu")
        b = b if self.spec.init == "zero" else b.normal_(generator=generator)
        self.lora_a = nn.Parameter(torch.zeros(shapes[EMBEDDING_A], device=device, dtype=self.spec.dtype))
        self.lora_b = nn.Parameter(b.to(device, self.spec.dtype))

    @classmethod
    def adapts(cls, module: nn.Module) -> bool:
        """Return True for embeddings."""
        return is_embedding(module)

    @classmethod
    def why_unsuitable(cls, base: nn.Module) -> str | None:
        """Return why LoRA is not defined on `base`; None if it is."""
        if not is_embedding(base):
            return "pass nn.Embedding"
        if base.max_norm is not None:
            return "it has max_norm, which changes the frozen table at each lookup. Leave the layer out of the targets"
        return None

    @classmethod
    def shapes(cls, module: nn.Module, spec: LoraSpec) -> dict[str, tuple[int, ...]]:
        """Return the shapes of A [rank, vocabulary] and B [dim, rank]."""
        base: Any = module.base if isinstance(module, AdaptedLayer) else module
        vocabulary, dim = base.weight.shape
        return {EMBEDDING_A: (spec.rank, vocabulary), EMBEDDING_B: (dim, spec.rank)}

    def forward(self, ids: Tensor) -> Tensor:
        """Map ids [...] to rows [..., dim]."""
        rows = self.base(ids)
        low = F.embedding(
            ids, self.lora_a.T, self.base.padding_idx, scale_grad_by_freq=self.base.scale_grad_by_freq
        )
        return rows + self.scaling * (low.to(rows.dtype) @ self.lora_b.to(rows.dtype).T)

    def merged_weight(self, weight: Tensor | None = None) -> Tensor:
        """Return W + scaling * (B A)^T [vocabulary, dim] in fp32, or in fp64 if an operand is fp64."""
        weight, a, b = self.wide(self.base.weight if weight is None else weight)
        return torch.addmm(weight, a.T, b.T, alpha=self.scaling)


def is_embedding(module: nn.Module) -> TypeGuard[nn.Embedding]:
    """Return True if `module` is known to look up rows and nothing else."""
    return isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward
