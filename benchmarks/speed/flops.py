"""How many floating point operations a training step needs, by formula.

With a frozen base there is no weight gradient: a pass over a linear costs 2 a weight and token in the forward,
2 in the backward (the input's gradient), and 2 more where it is recomputed. Only the first layer's q, k and v
need no input gradient. Elementwise work, norms, softmax and dequantization are not counted: they are overhead,
which is what the share of the matrix-product rate shows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.speed.presets import Shape


@dataclass(frozen=True)
class StepFlops:
    """Floating point operations of one step, by what they are for."""

    base: float
    """forward and input gradient of the frozen linears"""
    lora: float
    attention: float
    """causal, scores recomputed in the backward as flash attention does"""
    head: float
    """forward and input gradient, supervised tokens only"""
    recompute: float
    """what is computed a second time in the layers"""

    @property
    def needed(self) -> float:
        """Without recomputation."""
        return self.base + self.lora + self.attention + self.head

    @property
    def performed(self) -> float:
        """With it."""
        return self.needed + self.recompute


REPEATED = {
    "nothing": slice(0),
    "layers": slice(7),
    "layers without down_proj": slice(6),
    "gate and up": slice(4, 6),
}
"""What a step computes twice -> which of a layer's linears q, k, v, o, gate, up, down; with q, k, v attention too."""


def step_flops(
    shape: Shape, rank: int, lengths: Sequence[int], supervised: int, recompute: str = "nothing"
) -> StepFlops:
    """Of a step over documents of `lengths` tokens, `supervised` of them with a label; `recompute`: see REPEATED."""
    tokens = sum(lengths)
    linears = shape.linears()
    weights = shape.layers * sum(i * o for i, o in linears)
    first_qkv = sum(i * o for i, o in linears[:3])
    lora = shape.layers * rank * sum(i + o for i, o in linears)
    first_a = rank * sum(i for i, _ in linears[:3])
    squares = sum(length**2 for length in lengths) * shape.heads * shape.head_dim * shape.layers
    repeated = REPEATED[recompute]
    again = sum(2 * tokens * (i * o + rank * (i + o)) for i, o in linears[repeated]) * shape.layers
    if linears[repeated][:3] == linears[:3]:
        again += 2 * squares
    return StepFlops(
        base=tokens * (4 * weights - 2 * first_qkv),
        lora=tokens * (6 * lora - 2 * first_a),
        attention=7 * squares,
        head=4 * shape.hidden * shape.vocabulary * supervised,
        recompute=again,
    )
