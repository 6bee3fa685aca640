"""Everything worth measuring on a GPU in a few minutes, written line by line: `python -m benchmarks.gpu`."""
