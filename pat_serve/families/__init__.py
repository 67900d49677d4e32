"""Model families as data: the lines of their tensors, and the rules of their configs."""
