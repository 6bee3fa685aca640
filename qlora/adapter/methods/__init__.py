"""Adapter methods, a file each."""
