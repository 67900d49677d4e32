"""A cut as pure maths: axes, kept indices, the part of every tensor that stays, and rotations."""
