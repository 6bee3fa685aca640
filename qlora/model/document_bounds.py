"""Bounds of the documents in a row, for models whose layers keep a state from token to token.

State-space, linear-attention and convolutional layers know no attention mask. transformers passes `seq_idx` and
`cu_seq_lens_q` on to their kernels (packages causal-conv1d, flash-linear-attention and mamba-ssm), which then reset the
state between documents. Its own torch code cannot, and says so.
"""

from itertools import accumulate
from typing import Any

import torch
from torch import nn

from qlora.model.head import decoder_of

STATEFUL_KINDS = ("linear", "conv", "mamba", "recurrent")
"""parts of the names that transformers' `layer_types` have for such layers"""


def keeps_state(model: Any) -> bool:
    """Return True if layers of the model carry something from token to token other than by attention."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or []
    return (
        bool(getattr(model, "_is_stateful", False))
        or any(part in kind for kind in kinds for part in STATEFUL_KINDS)
        or any(isinstance(module, nn.Conv1d) for module in decoder_of(model).modules())
    )


def pass_bounds(model: Any, wanted: bool) -> None:
    """Make `bounds_passed` return `wanted` for the model."""
    model.passes_document_bounds = wanted


def bounds_passed(model: Any) -> bool:
    """Return True if the documents of a batch are concatenated in one row and their bounds passed to the layers."""
    return bool(getattr(model, "passes_document_bounds", False))


def arguments(lengths: tuple[int, ...], device: torch.device) -> dict[str, Any]:
    """Return the extra arguments of a forward pass over documents of these lengths, concatenated in one row."""
    numbers, positions = (
        [torch.full((length,), i) for i, length in enumerate(lengths)],
        map(torch.arange, lengths),
    )
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)
    longest = max(lengths)
    return {
        "position_ids": torch.cat(list(positions))[None].to(device, non_blocking=True),
        "seq_idx": torch.cat(numbers).to(torch.int32)[None].to(device, non_blocking=True),
        "cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest,
    }  # fmt: skip
