"""Choice of the next token from logits."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qlora.errors import ModelError

COLDEST = 1e-6
"""lower temperatures take the most likely token"""


def choose(
    logits: Tensor,
    seen: Sequence[int],
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    generator: torch.Generator | None = None,
) -> int:
    """Return the next token.

    Args:
        logits: [V], fp32, after the last token. They are not changed.
        seen: the tokens so far, prompt and answer, for the penalty.
        temperature: 0 takes the most likely token, as does anything below `COLDEST`.
        top_p: draw from the smallest set of most likely tokens whose probabilities add up to this; at least one.
        repetition_penalty: divides the logits of seen tokens where they are positive, else multiplies (Keskar et al.
            2019), as transformers does for a model whose generation config asks for it.
        generator: random numbers, on the CPU.

    Raises:
        ModelError: the logits are not finite.
    """
    if repetition_penalty != 1.0:
        ids = torch.tensor(sorted(set(seen)), device=logits.device)
        scores = logits[ids]
        logits = logits.index_copy(
            0, ids, torch.where(scores < 0, scores * repetition_penalty, scores / repetition_penalty)
        )
    if not torch.isfinite(logits.max()):  # the maximum of logits with a NaN is NaN
        raise ModelError("the model's logits are not finite")
    if temperature < COLDEST:
        return int(logits.argmax())
    # in fp64, so that low temperatures do not overflow
    scaled = (logits - logits.max()).double() / temperature
    probabilities = scaled.softmax(-1)
    if top_p >= 1:
        return int(torch.multinomial(probabilities.cpu(), 1, generator=generator))
    probabilities, tokens = probabilities.sort(descending=True, stable=True)
    before = probabilities.cumsum(-1) - probabilities
    kept = int((before < top_p).sum().clamp(min=1))
    return int(tokens[torch.multinomial(probabilities[:kept].cpu(), 1, generator=generator)])
