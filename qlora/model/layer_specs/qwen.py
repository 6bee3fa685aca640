"""Qwen 2 and 3 (Yang et al. 2024, 2025): Llama with a window in some layers; Qwen 3 normalises queries and keys."""

from qlora.model.layer_spec import LayerSpec

SPECS = [
    LayerSpec("Qwen2DecoderLayer", window="sliding_window"),
    LayerSpec("Qwen3DecoderLayer", window="sliding_window", qk_norm=True),
]
