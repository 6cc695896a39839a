"""Layers as graphs for ONNX Runtime, two a layer, which can be exported once and served from their folder."""
