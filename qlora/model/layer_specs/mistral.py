"""Mistral (Jiang et al. 2023): Llama with a sliding window in every layer."""

from qlora.model.layer_spec import LayerSpec

SPECS = [LayerSpec("MistralDecoderLayer", window="config.sliding_window")]
