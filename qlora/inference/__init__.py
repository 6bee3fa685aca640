"""A trained model, loaded again and asked."""
