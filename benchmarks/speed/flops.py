"""Formula for the floating point operations of a training step.

A frozen base needs no weight gradients. A linear layer costs 2 operations per weight and token in the forward pass, 2
in the backward pass (input gradient) and 2 more if it is recomputed. Only q, k and v of the first layer need no input
gradient. Elementwise work, norms, softmax and dequantization are not counted. They are overhead, which lowers the share
of the matrix-product rate in the reports.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.speed.presets import Linear, Shape


@dataclass(frozen=True)
class StepFlops:
    """Floating point operations of one step, by purpose."""

    base: float
    """forward and input gradient of the frozen linear layers"""
    lora: float
    attention: float
    """causal; scores are recomputed in the backward pass, as in flash attention"""
    head: float
    """forward and input gradient, supervised tokens only"""
    recompute: float
    """second forward pass of checkpointed layers"""

    @property
    def needed(self) -> float:
        """Operations without recomputation."""
        return self.base + self.lora + self.attention + self.head

    @property
    def performed(self) -> float:
        """Operations with recomputation."""
        return self.needed + self.recompute


REPEATED = {
    "nothing": slice(0),
    "layers": slice(None),
    "layers without down_proj": slice(-1),
    "gate and up": slice(4, 6),
}
"""Recomputed part -> slice of a layer's linear layers q, k, v, o, gate, up, down; q, k, v include attention. A mixture
has its router and its experts' gate and up in place of gate and up; the router is repeated with the layer only."""


def step_flops(
    shape: Shape, rank: int, lengths: Sequence[int], supervised: int, recompute: str = "nothing"
) -> StepFlops:
    """Count the operations of a step.

    Args:
        shape: The architecture.
        rank: Rank of the adapter, which is on every linear layer but routers.
        lengths: Tokens of each document of the step.
        supervised: Number of tokens with a label.
        recompute: A key of REPEATED.

    Returns:
        The operations by purpose.
    """
    tokens = sum(lengths)
    linears = shape.linears()
    weights = shape.layers * sum(_weights(linear) for linear in linears)
    first_qkv = sum(_weights(linear) for linear in linears[:3])
    lora = shape.layers * sum(_low_rank(linear, rank) for linear in linears)
    first_a = rank * sum(linear.inputs for linear in linears[:3])
    squares = sum(length**2 for length in lengths) * shape.heads * shape.head_dim * shape.layers
    repeated = REPEATED[recompute]
    twice = [one for one in linears[repeated] if not (one.frozen and recompute == "gate and up")]
    again = sum(2 * tokens * (_weights(one) + _low_rank(one, rank)) for one in twice) * shape.layers
    if linears[repeated][:3] == linears[:3]:
        again += 2 * squares
    return StepFlops(
        base=tokens * (4 * weights - 2 * first_qkv),
        lora=tokens * (6 * lora - 2 * first_a),
        attention=7 * squares,
        head=4 * shape.hidden * shape.vocabulary * supervised,
        recompute=again,
    )


def _weights(linear: Linear) -> int:
    """Return the weights that a token is multiplied with."""
    return linear.inputs * linear.outputs * linear.active


def _low_rank(linear: Linear, rank: int) -> int:
    """Return the weights of A and B that a token is multiplied with."""
    return linear.rank(rank) * (linear.inputs + linear.outputs) * linear.active
