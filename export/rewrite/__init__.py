"""The equations from the base's tensors to the exported ones, tensor by tensor and block by block."""
