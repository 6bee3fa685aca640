"""Files and folders: atomic writes, checksums, safetensors files, and the cache."""
