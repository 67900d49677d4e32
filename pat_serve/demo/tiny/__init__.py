"""The demo that trains its own small model and fetches nothing."""
