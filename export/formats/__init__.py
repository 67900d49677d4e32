"""What a checkpoint can be written as beside plain floats: int8 and fp8 (compressed-tensors), GGUF."""
