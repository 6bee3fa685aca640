"""Experiments on E2E NLG that compare fine-tuning methods and settings: `python -m benchmarks.methods`."""
