"""Description of a decoder layer of transformers, with all that `FusedLayer` needs to know of an architecture."""

from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import nn
from transformers.activations import GELUTanh, SiLUActivation

from qlora.kernels import GELU_TANH, SILU, Activation
from qlora.ops.rms_norm import Norm

ACTIVATIONS: dict[type, Activation] = {nn.SiLU: SILU, SiLUActivation: SILU, GELUTanh: GELU_TANH}
"""our activations by the module class of torch or transformers"""


@dataclass(frozen=True)
class LayerSpec:
    """Decoder layer with attention and a gated MLP; the defaults are Llama's.

        h = h + after_attention(o_proj(attention(q_proj n, k_proj n, v_proj n))),  n = before_attention(h)
        h = h + after_mlp(down_proj(activation(gate_proj n) * up_proj n)),         n = before_mlp(h)

    A norm that is None is left out of these equations. The attention module must have `head_dim` and `scaling`; the
    linears can have biases. A spec cannot describe capped attention scores, bidirectional attention or experts: such
    layers keep transformers' own code.
    """

    layer: str
    """name of transformers' class"""
    before_attention: str | None = "input_layernorm"
    """norms by their module names in the layer; None for no norm"""
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None
    norm_eps: str = "variance_epsilon"
    """attribute of a norm with its epsilon"""
    norm_offset: float = 0.0
    """number added to a norm's weight"""
    norm_rounds_late: bool = False
    """True if a norm rounds after the product with its weight, not before"""
    qk_norm: bool = False
    """True if queries and keys are normalised, per head or over all heads, depending on the width of `q_norm`"""
    window: str | None = None
    """path of the attention module's attribute with the sliding window, in tokens; None for no window"""
    activation: Activation = SILU

    def fits(self, layer: Any) -> bool:
        """Return True if this spec describes `layer`; its configuration can make it differ from its class."""
        attention = layer.self_attn
        capped = getattr(attention, "attn_logit_softcapping", None) is not None
        causal = getattr(attention, "is_causal", True)
        return causal and not capped and ACTIVATIONS.get(type(layer.mlp.act_fn)) is self.activation

    def norm(self, module: Any) -> Norm:
        """Return the constants of one of the layer's norms."""
        eps = getattr(module, self.norm_eps)
        return Norm(module.weight, eps, self.norm_offset, self.norm_rounds_late)

    def window_of(self, attention: Any) -> int | None:
        """Return the number of tokens that a token attends to, including itself; None for all."""
        return None if self.window is None else attrgetter(self.window)(attention)
