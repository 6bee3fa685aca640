"""The output head of a causal language model, with the scaling and capping of its logits, its embedding and decoder."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qlora.adapter.adapted_layer import AdaptedLayer
from qlora.adapter.trained_rows import TrainedRows, plain
from qlora.errors import ModelError
from qlora.ops.trained_rows import Rows, replace_columns
from qlora.quantization.nf4 import is_nf4

MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
"""keys of configurations that multiply the logits: Cohere, Falcon-H1, Muse"""
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
"""keys that divide them: Granite, Inkling"""
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""keys that cap them: Gemma 2 to 4, RecurrentGemma, xLSTM"""
MULTIPLIED_BY_SCALING = ("hyperclovax",)
"""model types that multiply by `logits_scaling`"""


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
    rows: Rows | None = None
    """trained rows that replace those of `weight` or extend it"""

    @property
    def vocabulary(self) -> int:
        """Number of logits."""
        return len(self.weight) if self.rows is None else self.rows.size

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [N, V] of hidden [N, H] in fp32; both are on the head's device."""
        if hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16):
            # Tensor cores sum in fp32: read the sums before they are rounded to 16 bits
            logits = torch.mm(hidden, self.weight.to(hidden.dtype).T, out_dtype=torch.float32)
        else:
            logits = hidden.float() @ self.weight.float().T
        if self.rows is not None:
            logits = replace_columns(logits, hidden.float(), self.rows)
        if self.bias is not None:
            logits[..., : len(self.bias)] += self.bias
        logits *= self.logit_scale
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()

    def to(self, device: torch.device | str) -> "Head":
        """Return the same head on another device."""
        bias = None if self.bias is None else self.bias.to(device)
        rows = self.rows
        if rows is not None:
            rows = rows._replace(ids=rows.ids.to(device), values=rows.values.to(device))
        return replace(self, weight=self.weight.to(device), bias=bias, rows=rows)


def head_of(model: nn.Module) -> Head:
    """Return the model's output head, with the scaling and capping that some architectures apply to their logits.

    `qlora.objective.checks.check_head` verifies that the model does nothing else.

    Raises:
        ModelError: the model has no plain output head, or one in NF4.
    """
    module = model.get_output_embeddings()  # type: ignore[operator]
    embeddings = plain(module)
    if isinstance(embeddings, AdaptedLayer):
        name = next(name for name, own in model.named_modules() if own is embeddings)
        raise ModelError(
            f"adapter.targets: {name} is the output head of {type(model).__name__}, and the loss reads its weight, so "
            f"it cannot get an adapter. Remove it from the targets; adapter.train_modules=[{name}] trains it as a whole"
        )
    if embeddings is None or not hasattr(embeddings, "weight"):
        raise ModelError(
            f"{type(model).__name__} has no plain output head: qlora trains causal language models only"
        )
    if is_nf4(embeddings):
        check_head_unquantized(model, [name for name, own in model.named_modules() if own is embeddings])
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    divided = config.model_type not in MULTIPLIED_BY_SCALING
    scale = math.prod(_numbers(config, MULTIPLIERS if divided else (*MULTIPLIERS, *DIVISORS)))
    if divided:
        scale /= math.prod(_numbers(config, DIVISORS))
    return Head(
        weight=embeddings.weight,
        bias=getattr(embeddings, "bias", None),
        logit_scale=scale,
        softcap=next(iter(_numbers(config, CAPS)), None),
        rows=module.rows if isinstance(module, TrainedRows) else None,
    )


def check_head_unquantized(model: nn.Module, quantized: Collection[str]) -> None:
    """Check that the output head is none of the layers that are in NF4, or will be.

    Raises:
        ModelError: it is; the checkpoint itself is in NF4, because loading quantizes no head.
    """
    head = plain(model.get_output_embeddings())  # type: ignore[operator]
    name = next((name for name, own in model.named_modules() if own is head and name in quantized), None)
    if name is not None:
        raise ModelError(
            f"base.model: the output head {name} of this {type(model).__name__} is in NF4, and the loss reads its "
            "weight unquantized. Use the 16-bit version of the model, or an NF4 version with the head in 16 bits "
            f"(llm_int8_skip_modules: [{name}])"
        )


def embedding_of(model: nn.Module) -> Any:
    """Return the model's input embedding, without trained rows around it."""
    return plain(model.get_input_embeddings())  # type: ignore[operator]


def decoder_of(model: Any) -> nn.Module:
    """Return the part of the model before its output head."""
    decoder = model.get_decoder()
    # transformers 5.24 finds no decoder in Llama4ForCausalLM, and the output head, named `decoder`, in ModernBERT's
    if decoder is model or decoder is model.get_output_embeddings():
        decoder = model.model
    assert isinstance(decoder, nn.Module)
    return decoder


def _numbers(config: Any, keys: Sequence[str]) -> list[float]:
    """Return the values of the keys that the configuration sets to a number other than 0."""
    return [float(value) for key in keys if (value := getattr(config, key, None))]
