"""Arithmetic with adapters: their sums, differences, truncations and spectra."""
