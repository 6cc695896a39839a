"""Layers as one C++ kernel: products, low-rank updates, norms and activations of many layer calls at once."""
