"""Phi-3 and Phi-4 (Abdin et al. 2024): Llama with one linear for queries, keys and values, and one for gate and up."""

from qlora.model.layer_spec import LayerSpec

SPECS = [
    LayerSpec(
        "Phi3DecoderLayer",
        qkv=("qkv_proj",),
        gate_up=("gate_up_proj",),
        act="activation_fn",
        window="config.sliding_window",
    )
]
