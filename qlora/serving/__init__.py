"""Serving: an OpenAI-compatible endpoint for a base and its adapters, with batched generation."""
