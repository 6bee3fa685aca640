"""Granite 3 (Granite Team 2024): Llama with a factor on the output of attention and MLP."""

from qlora.model.layer_spec import LayerSpec

SPECS = [LayerSpec("GraniteDecoderLayer", residual_scale="residual_multiplier")]
