"""Mistral (Jiang et al. 2023): Llama with a sliding window in every layer; Mixtral's experts keep their own code."""

from dataclasses import replace

from qlora.model.layer_spec import LayerSpec

MISTRAL = LayerSpec("MistralDecoderLayer", window="config.sliding_window")
SPECS = [MISTRAL, replace(MISTRAL, layer="MixtralDecoderLayer", experts=True)]
