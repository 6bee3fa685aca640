"""Llama (Touvron et al. 2023), whose layer the others vary."""

from qlora.model.layer_spec import LayerSpec

SPECS = [LayerSpec("LlamaDecoderLayer")]
