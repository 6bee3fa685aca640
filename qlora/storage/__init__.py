"""What lies on a disk: whole or not at all, with its checksums, kept for the next start."""
