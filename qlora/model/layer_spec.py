"""Description of a decoder layer of transformers, with all that `FusedLayer` needs to know of an architecture."""

from dataclasses import dataclass
from enum import Enum
from operator import attrgetter
from typing import Any

from torch import Tensor, nn
from transformers.activations import GELUTanh, SiLUActivation

from qlora.kernels import GELU_TANH, SILU, Activation
from qlora.ops.rms_norm import Norm

ACTIVATIONS: dict[type, Activation] = {nn.SiLU: SILU, SiLUActivation: SILU, GELUTanh: GELU_TANH}
"""our activations by the module class of torch or transformers"""


class Rotary(Enum):
    """Order of the r rotated features of a head, and of the r angles that the model passes to its layers."""

    HALVES = "features i and i + r/2 are a pair, and so are the angles"
    PAIRS = "features 2i and 2i + 1 are a pair, and so are the angles"
    PAIRS_BY_HALVES = "features 2i and 2i + 1 are a pair, and angles i and i + r/2"


@dataclass(frozen=True)
class LayerSpec:
    """Decoder layer with attention and a gated MLP; the defaults are Llama's.

        h = h + s after_attention(o_proj(attention(q_proj n, k_proj n, v_proj n))),  n = before_attention(h)
        h = h + s after_mlp(down_proj(activation(gate_proj n) * up_proj n)),         n = before_mlp(h)

    A norm that is None is left out of these equations. The attention module must have `head_dim` and `scaling`; the
    linears can have biases. With `experts`, an MLP that is not gated is any module, and keeps its own code. A spec
    cannot describe bidirectional attention: such layers keep transformers' own code.
    """

    layer: str
    """name of transformers' class"""
    before_attention: str | None = "input_layernorm"
    """norms by their module names in the layer; None for no norm"""
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None
    parallel: bool = False
    """True if the MLP reads the input of the layer too, not the output of attention: h + attention + mlp"""
    norm_eps: str = "variance_epsilon"
    """attribute of a norm with its epsilon"""
    norm_offset: float = 0.0
    """number added to a norm's weight"""
    norm_rounds_late: bool = False
    """True if a norm rounds after the product with its weight, not before"""
    norm_centred: bool = False
    """True if a norm subtracts the mean first: layer normalisation"""
    qk_norm: bool = False
    """True if queries and keys are normalised, per head or over all heads, depending on the width of `q_norm`"""
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    """linears of queries, keys and values; or one linear with these outputs in this order"""
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    """linears of gate and up; or one linear with these outputs in this order"""
    act: str = "act_fn"
    """attribute of the MLP with its activation"""
    activation: Activation = SILU
    window: str | None = None
    """path of the attention module's attribute with the sliding window, in tokens; None for no window"""
    softcap: str | None = None
    """path of the attention module's attribute with the bound of its scores; None for no bound"""
    rotary: Rotary = Rotary.HALVES
    rotary_if: str | None = None
    """path of the attention module's attribute that is 0 or None in a layer that does not rotate; None: all rotate"""
    residual_scale: str | None = None
    """attribute of the layer with the factor s of the output of attention and MLP; None for 1"""
    experts: bool = False
    """True if a layer of this class can have experts in place of the gated MLP"""

    def obstacle(self, layer: Any) -> str | None:
        """Say what of `layer` this spec does not describe; None if it fits. Its configuration can change a layer."""
        attention, mlp = layer.self_attn, layer.mlp
        if not getattr(attention, "is_causal", True):
            return "their attention is not causal"
        if self.softcap is None and getattr(attention, "attn_logit_softcapping", None) is not None:
            return "their attention scores are capped"
        if getattr(attention, "q_norm", None) is not None and not self.qk_norm:
            return "their queries and keys are normalised"
        if any(isinstance(child, nn.Dropout) and child.p for child in layer.children()):
            return "their config.json asks for dropout between the blocks"
        if not self.is_gated(mlp):
            return None if self.experts else f"their {type(mlp).__name__} has another form"
        activation = type(getattr(mlp, self.act))
        return (
            None
            if ACTIVATIONS.get(activation) is self.activation
            else f"their activation is {activation.__name__}"
        )

    def is_gated(self, mlp: nn.Module) -> bool:
        """Return True if an MLP has the linears of a gated one."""
        return all(hasattr(mlp, name) for name in (*self.gate_up, "down_proj"))

    def norm(self, module: Any) -> Norm:
        """Return the constants of one of the layer's norms."""
        eps = getattr(module, self.norm_eps)
        return Norm(module.weight, eps, self.norm_offset, self.norm_rounds_late, self.norm_centred)

    def window_of(self, attention: Any) -> int | None:
        """Return the number of tokens that a token attends to, including itself; None for all."""
        return None if self.window is None else attrgetter(self.window)(attention)

    def softcap_of(self, attention: Any) -> float | None:
        """Return the bound of the attention scores; None for no bound."""
        return None if self.softcap is None else attrgetter(self.softcap)(attention)

    def rotates(self, attention: Any) -> bool:
        """Return True if queries and keys get a rotary embedding."""
        return self.rotary_if is None or bool(attrgetter(self.rotary_if)(attention))

    def angles(self, cosines_or_sines: Tensor) -> Tensor:
        """Return cosines or sines [B or 1, T, r] in the order of the rotated features."""
        if self.rotary is not Rotary.PAIRS_BY_HALVES:
            return cosines_or_sines
        half = cosines_or_sines.shape[-1] // 2
        return cosines_or_sines[..., :half].repeat_interleave(2, dim=-1)

    def scale_of(self, layer: Any) -> float:
        """Return the factor of the output of attention and MLP."""
        return 1.0 if self.residual_scale is None else float(getattr(layer, self.residual_scale))
