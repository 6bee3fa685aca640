"""Memory: what a run takes."""
