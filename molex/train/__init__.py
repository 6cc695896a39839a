"""Training and evaluation of adapters, over the same forward pass that serves them."""
