"""Mistral (Jiang et al. 2023): Llama with a sliding window; Mixtral has experts for its MLP.

Ministral has the window only in some layers.
"""

from dataclasses import replace

from qlora.model.layer_spec import LayerSpec

MISTRAL = LayerSpec("MistralDecoderLayer", window="config.sliding_window")
SPECS = [
    MISTRAL,
    replace(MISTRAL, layer="MinistralDecoderLayer", window="sliding_window"),
    replace(MISTRAL, layer="MixtralDecoderLayer", experts=True),
]
