"""Tokenizers: the tokens that they add, and ids that a model has no row for."""
