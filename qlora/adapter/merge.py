"""An adapter added into its weight: W + scaling * B A. Returns weights; no layer is ever changed by it.

The sum is taken in fp32 (fp64 where an operand is fp64), whatever W, A and B are stored in; NF4 weights are
dequantized to fp32, which holds them exactly. So the result is right to fp32's own rounding, and the first
real rounding is the caller's, who stores it in 16 or 4 bits.
"""

import torch
from torch import Tensor

from qlora.adapter.methods.lora import LoRALinear
from qlora.quantization.nf4 import dense, quant_state


def merged_weight(layer: LoRALinear, weight: Tensor | None = None) -> Tensor:
    """The dense weight [out, in] that computes what `layer` computes without dropout; fp32 or wider.

        >>> y = torch.nn.functional.linear(x, merged_weight(layer), layer.base.bias)

    weight: what to add the update to, on any device and there the result is; None is the layer's own frozen
        weight, dequantized if it is in 4 bits.
    """
    if weight is None:
        weight = dense(layer.base.weight, quant_state(layer.base), _wide(layer.lora_a, layer.base.weight))
        weight = weight.T if layer.fan_in_fan_out else weight
    assert weight.shape == (layer.out_features, layer.in_features), f"{weight.shape} is not the layer's shape"
    dtype = _wide(layer.lora_a, weight)
    a = layer.lora_a.detach().to(weight.device, dtype)
    b = layer.lora_b.detach().to(weight.device, dtype)
    return torch.addmm(weight.detach().to(dtype), b, a, alpha=layer.scaling)


def _wide(*operands: Tensor) -> torch.dtype:
    """fp32, or fp64 where there is one."""
    return torch.float64 if any(t.dtype == torch.float64 for t in operands) else torch.float32
