"""SmolLM3 (Bakouch et al. 2025): Llama without rotary embedding in every fourth layer."""

from qlora.model.layer_spec import LayerSpec

SPECS = [LayerSpec("SmolLM3DecoderLayer", window="sliding_window", rotary_if="use_rope")]
