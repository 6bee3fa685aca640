"""Gemma (Gemma Team 2024): Llama with GELU and another form of the norm."""

from qlora.kernels import GELU_TANH
from qlora.model.layer_spec import LayerSpec

SPECS = [
    LayerSpec(
        "GemmaDecoderLayer", norm_eps="eps", norm_offset=1.0, norm_rounds_late=True, activation=GELU_TANH
    )
]
