"""YAML files that lm-eval reads, and what they name."""
