"""Merging: write base and adapter as one model."""
