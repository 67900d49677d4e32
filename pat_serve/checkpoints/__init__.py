"""Checkpoints on a disk: found, recognized, checked, and read one tensor at a time."""
