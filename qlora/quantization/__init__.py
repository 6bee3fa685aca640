"""NF4 weights, and how transformers loads them."""
