"""Speed and memory of a training step, side by side with the peers: `python -m benchmarks.speed`."""
