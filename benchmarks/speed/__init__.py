"""Compares speed and memory of a training step with other trainers: `python -m benchmarks.speed`."""
