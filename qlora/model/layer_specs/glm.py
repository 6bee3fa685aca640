"""GLM 4 (GLM Team 2024): a rotary embedding of half the features in pairs, one linear for gate and up.

The class Glm4 has norms around both blocks.
"""

from dataclasses import replace

from qlora.model.layer_spec import LayerSpec, Rotary

GLM = LayerSpec(
    "GlmDecoderLayer", gate_up=("gate_up_proj",), act="activation_fn", rotary=Rotary.PAIRS_BY_HALVES
)
SPECS = [
    GLM,
    replace(
        GLM,
        layer="Glm4DecoderLayer",
        after_attention="post_self_attn_layernorm",
        after_mlp="post_mlp_layernorm",
    ),
]
