"""Check that a token does not see later ones, on a row of a few tokens and with the model's own attention.

A model that reads in both directions sees the token that it should predict. Its loss falls fast, and it learns nothing
of use; if our causal attention replaces its own, it is trained in another way than it was made, without a word. Two
rows that differ in their last token have the same shape, so the hidden states before it are equal to the last bit.
"""

from math import inf
from typing import Any

import torch
from transformers import PreTrainedModel

from qlora.errors import ModelError
from qlora.model.head import head_of
from qlora.objective.apart import IN_16_BITS, IN_32_BITS, LEAK, LONG, TRIES, difference, has_experts, states
from qlora.objective.step import evaluation_mode

KEYS = (("is_causal", False), ("is_decoder", False), ("use_bidirectional_attention", True))
"""keys of configurations, and the values with which attention is not causal: Llama, BERT, Gemma 3"""


@torch.no_grad()
def check_causal(model: PreTrainedModel, name: str) -> None:
    """Check that the last token of a row changes nothing before it; run this before our attention replaces the model's.

    Args:
        model: the model.
        name: `base.model`, for the message.

    Raises:
        ModelError: the hidden state of a token depends on later tokens.
    """
    smallest = inf
    for seed in range(TRIES):  # a router that is undecided between two experts can change one result
        found, allowed = _influence(model, seed)
        if found <= allowed:
            return
        smallest = min(smallest, found)
    key = next((key for key, value in KEYS if _set_to(model.config, key, value)), None)
    cause = "" if key is None else f", as {key} in its config.json says"
    raise ModelError(
        f"base.model: {name!r} is not causal: in {type(model).__name__} a token sees later ones{cause} (the last token "
        f"of a row changes a hidden state before it by {smallest:.2g} of its size). It would see what it should "
        "predict, and qlora trains causal language models only. Use one"
    )


def _influence(model: PreTrainedModel, seed: int) -> tuple[float, float]:
    """Return the largest relative change of a hidden state by a later token, and the largest that rounding explains."""
    vocabulary = head_of(model).vocabulary
    ids = torch.randint(vocabulary, (LONG,), generator=torch.Generator().manual_seed(seed))
    other = ids.clone()
    other[-1] = (ids[-1] + vocabulary // 2) % vocabulary
    with evaluation_mode(model):
        one, two = states(model, ids), states(model, other)
    tolerance = IN_32_BITS if one.itemsize >= 4 else IN_16_BITS
    return difference(one[:-1], two[:-1]), tolerance.rounding if has_experts(model) else LEAK


def _set_to(config: Any, key: str, value: bool) -> bool:
    """Return True if the configuration of the model or of its text part sets the key to a value that means `value`."""
    found = [getattr(part, key, None) for part in (config, config.get_text_config())]
    return any(one is not None and bool(one) is value for one in found)
