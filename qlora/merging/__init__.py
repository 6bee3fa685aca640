"""Base and adapter as one model."""
