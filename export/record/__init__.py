"""What an export says of itself: provenance, model card, hub."""
