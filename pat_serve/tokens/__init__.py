"""Tokenizers beside the models that they feed."""
