"""Adapter layers (Houlsby et al. 2019, arXiv:1902.00751), a rival of LoRA that exists in this benchmark only.

A bottleneck follows each attention and each MLP of a decoder layer, before the residual sum: y + U gelu(D y + c) + e,
with D [width, out] and U [out, width]. U, c and e start at zero, so training starts at the base. The bottleneck cannot
be merged, because it is not linear.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora.adapter.adapted_linear import AdaptedLinear
from qlora.adapter.methods import Method
from qlora.adapter.methods.lora import layer_generator
from qlora.adapter.targets import select
from qlora.adapter.wrap import wrap
from qlora.recipe import Adapter

WIDTH = 38
"""width of a bottleneck; 158,000 parameters on the bundled base, as many as LoRA of rank 8 on all linears (157,696)"""

PLACES = ("o_proj", "down_proj")
"""last linears of the attention and of the MLP; a bottleneck follows each"""


class BottleneckLinear(AdaptedLinear):
    """A frozen linear followed by a trained bottleneck with a residual; maps x [..., in] to [..., out] in x.dtype."""

    SAVED: ClassVar[Mapping[str, str]] = {}

    def __init__(self, base: nn.Module, width: int, generator: torch.Generator | None = None) -> None:
        super().__init__(base)
        out = self.out_features
        down = torch.empty(width, out).normal_(0.0, 0.01, generator=generator)
        self.down = nn.Parameter(down.bfloat16())
        self.down_bias = nn.Parameter(torch.zeros(width, dtype=torch.bfloat16))
        self.up = nn.Parameter(torch.zeros(out, width, dtype=torch.bfloat16))
        self.up_bias = nn.Parameter(torch.zeros(out, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in] to [..., out]."""
        y = self.base(x)
        inner = F.gelu(F.linear(y, self.down.to(y.dtype), self.down_bias.to(y.dtype)))
        return y + F.linear(inner, self.up.to(y.dtype), self.up_bias.to(y.dtype))


class AdapterLayers(Method):
    """Adapter layers after each attention and each MLP."""

    name = "adapter_layers"

    def apply(self, model: nn.Module, settings: Adapter, seed: int) -> nn.Module:
        """Freeze `model` and put a bottleneck after the linears in `PLACES`; `settings` has no say."""
        model.requires_grad_(False)
        layers = {
            name: BottleneckLinear(model.get_submodule(name), WIDTH, layer_generator(seed, name))
            for name in select(model, PLACES)
        }
        return wrap(model, layers)
