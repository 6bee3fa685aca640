"""The base model: loaded, given our layers and adapters, ready to train."""
