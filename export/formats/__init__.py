"""Formats of a checkpoint beside plain floats: int8 and fp8 (compressed-tensors), GGUF."""
