"""Inference: load a trained model, generate answers, evaluate and chat."""
