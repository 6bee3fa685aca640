"""Gemma 2 (Gemma Team 2024): norms around both blocks, GELU, capped attention scores, a window in every other layer."""

from qlora.kernels import GELU_TANH
from qlora.model.layer_spec import LayerSpec

SPECS = [
    LayerSpec(
        "Gemma2DecoderLayer",
        after_attention="post_attention_layernorm",
        before_mlp="pre_feedforward_layernorm",
        after_mlp="post_feedforward_layernorm",
        norm_eps="eps",
        norm_offset=1.0,
        norm_rounds_late=True,
        window="sliding_window",
        softcap="attn_logit_softcapping",
        activation=GELU_TANH,
    )
]
