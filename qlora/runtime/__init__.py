"""The process and its machine: device, allocators, signals, streams, other processes."""
