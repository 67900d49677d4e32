"""YAML files that lm-eval reads, and the functions that the files name."""
