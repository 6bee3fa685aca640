"""The process and its machine: devices, allocators, signals, output streams and parallel processes."""
