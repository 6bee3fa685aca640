"""Command R7B and A (Cohere 2025): attention and MLP both read one layer norm; only layers with a window rotate."""

from qlora.model.layer_spec import LayerSpec, Rotary

SPECS = [
    LayerSpec(
        "Cohere2DecoderLayer",
        before_mlp="input_layernorm",
        parallel=True,
        norm_centred=True,
        window="sliding_window",
        rotary=Rotary.PAIRS,
        rotary_if="sliding_window",
    )
]
