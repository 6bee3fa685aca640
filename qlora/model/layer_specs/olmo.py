"""OLMo 2 and 3 (OLMo Team 2025): norms only after both blocks, and on queries and keys over all heads.

OLMo 3 has a window in most layers.
"""

from dataclasses import replace

from qlora.model.layer_spec import LayerSpec

OLMO2 = LayerSpec(
    "Olmo2DecoderLayer",
    before_attention=None,
    after_attention="post_attention_layernorm",
    before_mlp=None,
    after_mlp="post_feedforward_layernorm",
    norm_rounds_late=True,
    qk_norm=True,
)
SPECS = [OLMO2, replace(OLMO2, layer="Olmo3DecoderLayer", window="sliding_window")]
