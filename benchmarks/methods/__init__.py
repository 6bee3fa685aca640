"""Experiments that compare fine-tuning methods and their settings on E2E NLG; `python -m benchmarks.methods` runs them."""
