"""What a decoder layer of transformers computes: all that `FusedLayer` needs to know of an architecture."""

from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import nn
from transformers.activations import GELUTanh, SiLUActivation

from qlora.kernels import GELU_TANH, SILU, Activation
from qlora.ops.rms_norm import Norm

ACTIVATIONS: dict[type, Activation] = {nn.SiLU: SILU, SiLUActivation: SILU, GELUTanh: GELU_TANH}
"""transformers' modules, as our passes"""


@dataclass(frozen=True)
class LayerSpec:
    """Describe a layer of attention and a gated MLP; the defaults are Llama's. A norm of None is left out of

        h = h + after_attention(o_proj(attention(q_proj n, k_proj n, v_proj n))),  n = before_attention(h)
        h = h + after_mlp(down_proj(activation(gate_proj n) * up_proj n)),         n = before_mlp(h)

    All layers have `head_dim` and `scaling` in their attention module, and biases in their linears. No spec describes
    capped attention scores, attention in both directions or experts: such layers stay transformers' own.
    """

    layer: str
    """name of transformers' class"""
    before_attention: str | None = "input_layernorm"
    """norms, by the names of the layer's modules"""
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None
    norm_eps: str = "variance_epsilon"
    """where a norm has its epsilon"""
    norm_offset: float = 0.0
    """added to a norm's weight"""
    norm_rounds_late: bool = False
    """a norm rounds after the product with its weight, not before it"""
    qk_norm: bool = False
    """queries and keys are normalised, over as many features as `q_norm` has: those of a head, or all"""
    window: str | None = None
    """where the attention module has the number of tokens that a token looks back, itself counted"""
    activation: Activation = SILU

    def fits(self, layer: Any) -> bool:
        """Whether this very layer, which its configuration may have changed, computes what is written here."""
        attention = layer.self_attn
        capped = getattr(attention, "attn_logit_softcapping", None) is not None
        causal = getattr(attention, "is_causal", True)
        return causal and not capped and ACTIVATIONS.get(type(layer.mlp.act_fn)) is self.activation

    def norm(self, module: Any) -> Norm:
        """The constants of one of the layer's norms."""
        eps = getattr(module, self.norm_eps)
        return Norm(module.weight, eps, self.norm_offset, self.norm_rounds_late)

    def window_of(self, attention: Any) -> int | None:
        """How many tokens back a token looks, itself counted; None for all."""
        return None if self.window is None else attrgetter(self.window)(attention)
