"""Checkpoints on a disk. They are found, recognized, checked, and read one tensor at a time."""
