"""Llama (Touvron et al. 2023); the layers of the other families are variants of it."""

from qlora.model.layer_spec import LayerSpec

SPECS = [LayerSpec("LlamaDecoderLayer")]
