"""The demo that trains a small model of its own and fetches nothing."""
