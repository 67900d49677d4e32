"""A finished training run, opened and checked."""
