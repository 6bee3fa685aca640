"""Qwen 2 and 3 (Yang et al. 2024, 2025): Llama with a window in some layers; Qwen 3 normalises queries and keys.

The mixture of experts of Qwen 3 keeps its own code.
"""

from dataclasses import replace

from qlora.model.layer_spec import LayerSpec

QWEN3 = LayerSpec("Qwen3DecoderLayer", window="sliding_window", qk_norm=True)
SPECS = [
    LayerSpec("Qwen2DecoderLayer", window="sliding_window"),
    QWEN3,
    replace(QWEN3, layer="Qwen3MoeDecoderLayer", experts=True),
]
