"""Memory categories of every estimate, forecast and measurement."""

PARTS: dict[str, str] = {
    "base_nf4": "base, NF4",
    "quantization_statistics": "quantization statistics",
    "base_unquantized": "base, not quantized",
    "adapters": "adapters (or trained weights)",
    "gradients": "gradients",
    "optimizer_state": "optimizer state",
    "optimizer_state_paged": "optimizer state, paged",
    "saved_activations": "saved activations",
    "working_set": "working set of the layer in flight",
    "logits_and_loss": "logits and loss",
    "dequantization": "dequantized weights",
    "allocator_slack": "allocator slack",
    "device_context": "CUDA context",
}
"""key in memory.json -> label, in display order"""
