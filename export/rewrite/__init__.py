"""From the base's tensors to the exported ones: the equations, tensor by tensor and block by block."""
