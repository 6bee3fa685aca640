"""OLMo 2 (OLMo Team 2025): norms only after both blocks, and on queries and keys over all heads."""

from qlora.model.layer_spec import LayerSpec

SPECS = [
    LayerSpec(
        "Olmo2DecoderLayer",
        before_attention=None,
        after_attention="post_attention_layernorm",
        before_mlp=None,
        after_mlp="post_feedforward_layernorm",
        norm_rounds_late=True,
        qk_norm=True,
    )
]
