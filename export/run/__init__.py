"""Open and check a finished training run."""
