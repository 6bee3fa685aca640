"""Table of the causal language models of transformers, and of the commands that work on each."""
