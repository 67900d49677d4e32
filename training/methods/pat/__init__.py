"""Pruning-aware tuning (PAT): its modules, its schedule, its losses, its settings."""
