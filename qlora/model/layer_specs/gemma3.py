"""Gemma 3 (Gemma Team 2025): norms around both blocks and on queries and keys, GELU, a window in most layers."""

from qlora.kernels import GELU_TANH
from qlora.model.layer_spec import LayerSpec

SPECS = [
    LayerSpec(
        "Gemma3DecoderLayer",
        after_attention="post_attention_layernorm",
        before_mlp="pre_feedforward_layernorm",
        after_mlp="post_feedforward_layernorm",
        norm_eps="eps",
        norm_offset=1.0,
        norm_rounds_late=True,
        qk_norm=True,
        window="sliding_window",
        activation=GELU_TANH,
    )
]
