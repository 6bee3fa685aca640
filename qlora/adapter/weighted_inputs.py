"""Blocks of experts that multiply the input of an expert by its routing weight, where others multiply its output.

Llama 4's block gives each of its experts all tokens, times a weight that is 0 for most. Our module of experts takes
choices instead. An expert without biases maps 0 to 0, so only the chosen pairs of token and expert need computing.
"""

from types import MethodType
from typing import Any

from torch import Tensor, nn

BLOCKS = ("Llama4TextMoe",)
"""classes of transformers with `router`, `experts`, `shared_expert` and `top_k`"""


def give_choices(block: nn.Module) -> None:
    """Make `block` call its experts with choices, if it is such a block."""
    if type(block).__name__ in BLOCKS:
        block.forward = MethodType(_forward, block)


def give_all_tokens(block: nn.Module) -> None:
    """Make `block` call its experts as transformers does."""
    vars(block).pop("forward", None)


def _forward(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """Map hidden states [..., H] to the output of the block [N, H] and the router's logits [N, E]."""
    tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
    scores, logits = self.router(tokens)
    weights, choices = scores.topk(self.top_k, dim=-1)
    rows = (tokens[:, None] * weights[..., None]).flatten(0, 1)
    choices = choices.reshape(-1, 1)
    routed = self.experts(rows, choices, rows.new_ones(choices.shape))
    return self.shared_expert(tokens) + routed.view(len(tokens), self.top_k, -1).sum(1), logits
