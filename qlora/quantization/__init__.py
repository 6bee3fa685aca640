"""NF4 weights, and loading them with transformers."""
