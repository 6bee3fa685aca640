"""Sweeps that damage what a user can give to the package, and count what happens."""
