"""The base model: loading, fused layers, activation checkpointing and offload, and assembly for training."""
