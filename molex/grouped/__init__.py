"""Layers as grouped products: which layer a row goes through is data on the device, not a branch of ours."""
