"""What a model is trained for: from a batch to its loss and gradients."""
