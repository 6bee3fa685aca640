"""LoRA on a convolution: h = W * x + bias + scaling * B * (A * x), with A a convolution to `rank` channels and B 1 x 1.

A [rank, in, *kernel] has the kernel, stride, padding and dilation of W, and B [out, rank, 1, ...] mixes the channels,
as in the reference code of LoRA and in PEFT (`Conv2d`). The update of W [out, in, *kernel] is the product B A of the
matrices [out, rank] and [rank, in * kernel], so it can be merged. PEFT ignores the dilation of W; then only ours does
what the merged layer does.
"""

from typing import Any, ClassVar, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora.adapter.adapted_layer import AdaptedLayer
from qlora.adapter.lora_spec import LoraSpec
from qlora.adapter.low_rank_layer import LowRankLayer, initial_a
from qlora.adapter.peft_tensors import SUFFIX_A, SUFFIX_B
from qlora.ops.dropout import draw

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
"""functions by the number of dimensions of the kernel"""


class LoRAConv(LowRankLayer):
    """A frozen convolution of one, two or three dimensions with a trainable low-rank update.

    The layer maps x [N, in, ...] to [N, out, ...] in x.dtype.

    Args:
        base: an `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d` with one group and zeros as padding. It is frozen in place.
        spec: the same settings as those of `LoRALinear`; None means the defaults of `LoraSpec`.
        generator: CPU generator that A is drawn from; None means torch's default generator.

    Raises:
        ModelError: `base` is another layer, has several groups or another padding mode.
    """

    SAVED: ClassVar = {SUFFIX_A: "lora_a", SUFFIX_B: "lora_b"}
    base: nn.Conv2d

    def __init__(
        self, base: nn.Module, spec: LoraSpec | None = None, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(base, spec)
        device, shapes = self.base.weight.device, self.shapes(base, self.spec)
        self.lora_a = nn.Parameter(
            initial_a(self.spec.init, shapes[SUFFIX_A], device, generator).to(device, self.spec.dtype)
        )
        self.lora_b = nn.Parameter(torch.zeros(shapes[SUFFIX_B], device=device, dtype=self.spec.dtype))

    @classmethod
    def adapts(cls, module: nn.Module) -> bool:
        """Return True for convolutions."""
        return is_convolution(module)

    @classmethod
    def why_unsuitable(cls, base: nn.Module) -> str | None:
        """Return why LoRA is not defined on `base`; None if it is."""
        if not is_convolution(base):
            return "pass nn.Conv1d, nn.Conv2d or nn.Conv3d"
        if base.groups != 1:
            return (
                f"it has {base.groups} groups, and the update of A and B mixes all channels, so it could not be "
                "merged. Leave the layer out of the targets"
            )
        if base.padding_mode != "zeros":
            return (
                f"its padding_mode is {base.padding_mode!r}, and PEFT pads A's input with zeros, so the adapter would "
                "compute something else there. Leave the layer out of the targets"
            )
        return None

    @classmethod
    def shapes(cls, module: nn.Module, spec: LoraSpec) -> dict[str, tuple[int, ...]]:
        """Return the shapes of A [rank, in, *kernel] and B [out, rank, 1, ...]."""
        base: Any = module.base if isinstance(module, AdaptedLayer) else module
        out_channels, in_channels, *kernel = base.weight.shape
        return {
            SUFFIX_A: (spec.rank, in_channels, *kernel),
            SUFFIX_B: (out_channels, spec.rank, *(1 for _ in kernel)),
        }

    def forward(self, x: Tensor) -> Tensor:
        """Map x [N, in, ...] to [N, out, ...]."""
        dropout = draw(self.dropout if self.training else 0.0, self.number)
        dropped = x if dropout is None else x * dropout.mask(x) / (1 - dropout.rate)
        low = self.base._conv_forward(
            dropped, self.lora_a.to(x.dtype), None
        )  # stride and padding of the base
        mix = CONVOLVE[len(self.base.kernel_size)]
        return self.base(x) + self.scaling * mix(low, self.lora_b.to(low.dtype))

    def merged_weight(self, weight: Tensor | None = None) -> Tensor:
        """Return W + scaling * B A [out, in, *kernel] in fp32, or in fp64 if an operand is fp64."""
        weight, a, b = self.wide(self.base.weight if weight is None else weight)
        return weight + self.scaling * (b.flatten(1) @ a.flatten(1)).view_as(weight)


def is_convolution(module: nn.Module) -> TypeGuard[nn.Conv1d | nn.Conv2d | nn.Conv3d]:
    """Return True if `module` is known to compute a convolution and nothing else."""
    return isinstance(module, CONVOLUTIONS) and any(
        type(module).forward is kind.forward for kind in CONVOLUTIONS
    )
