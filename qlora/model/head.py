"""The output head of a causal language model: its weight and what it does to its logits."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from qlora.errors import ModelError


@dataclass(frozen=True)
class Head:
    """The output head of a causal language model: logits = softcap(logit_scale · (hidden Wᵀ + bias))."""

    weight: Tensor  # [vocabulary, hidden]
    bias: Tensor | None  # [vocabulary]
    logit_scale: float
    softcap: float | None

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [N, H] -> logits [N, V] in fp32; both on the head's device."""
        if hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16):
            # Tensor cores sum in fp32: take the sums before they are rounded to 16 bits
            logits = torch.mm(hidden, self.weight.to(hidden.dtype).T, out_dtype=torch.float32)
        else:
            logits = hidden.float() @ self.weight.float().T
        if self.bias is not None:
            logits += self.bias
        logits *= self.logit_scale
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()

    def to(self, device: torch.device | str) -> "Head":
        """The same head on another device."""
        bias = None if self.bias is None else self.bias.to(device)
        return replace(self, weight=self.weight.to(device), bias=bias)


def head_of(model: nn.Module) -> Head:
    """The model's output head, with the scalings that some architectures apply to their logits.

    Cohere multiplies by `logit_scale`, Granite divides by `logits_scaling`, Gemma 2 and 3 cap with
    `final_logit_softcapping`. `check_head` proves that nothing else is done to them.
    """
    embeddings = model.get_output_embeddings()  # type: ignore[operator]
    if embeddings is None or not hasattr(embeddings, "weight"):
        raise ModelError(
            f"{type(model).__name__} has no plain output head: qlora trains causal language models, and their head "
            "cannot be an adapter's target"
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
