"""The output head of a causal language model: its weight, and the scaling and capping of its logits."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from qlora.errors import ModelError


@dataclass(frozen=True)
class Head:
    """The output head of a causal language model: logits = softcap(logit_scale · (hidden Wᵀ + bias))."""

    weight: Tensor
    """[vocabulary, hidden]"""
    bias: Tensor | None
    """[vocabulary]"""
    logit_scale: float
    softcap: float | None
    """limit c of the capped logits, c · tanh(logits / c); None for no cap"""

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [N, V] of hidden [N, H] in fp32; both are on the head's device."""
        if hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16):
            # Tensor cores sum in fp32: read the sums before they are rounded to 16 bits
            logits = torch.mm(hidden, self.weight.to(hidden.dtype).T, out_dtype=torch.float32)
        else:
            logits = hidden.float() @ self.weight.float().T
        if self.bias is not None:
            logits += self.bias
        logits *= self.logit_scale
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()

    def to(self, device: torch.device | str) -> "Head":
        """Return the same head on another device."""
        bias = None if self.bias is None else self.bias.to(device)
        return replace(self, weight=self.weight.to(device), bias=bias)


def head_of(model: nn.Module) -> Head:
    """Return the model's output head, with the scaling and capping that some architectures apply to their logits.

    Cohere multiplies the logits by `logit_scale`, Granite divides them by `logits_scaling`, and Gemma 2 and 3 cap them
    with `final_logit_softcapping`. `qlora.objective.checks.check_head` verifies that the model does nothing else.

    Raises:
        ModelError: the model has no plain output head.
    """
    embeddings = model.get_output_embeddings()  # type: ignore[operator]
    if embeddings is None or not hasattr(embeddings, "weight"):
        raise ModelError(
            f"{type(model).__name__} has no plain output head: qlora trains causal language models only. If the head "
            "is a target of the adapter, remove it from the targets"
        )
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
        getattr(config, "logits_scaling", 0) or 1.0
    )
    return Head(
        weight=embeddings.weight,
        bias=getattr(embeddings, "bias", None),
        logit_scale=scale,
        softcap=getattr(config, "final_logit_softcapping", None),
    )
