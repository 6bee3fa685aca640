"""Arithmetic with adapters: sums, differences, truncations and spectra."""
