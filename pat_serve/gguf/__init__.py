"""A GGUF file as a base: read once, checked, and written as a plain folder that everything else works from."""
