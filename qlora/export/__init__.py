"""The way out: files for other programs (GGUF, Ollama) and a folder for the hub."""
