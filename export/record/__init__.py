"""The records of an export: provenance, model card, hub."""
