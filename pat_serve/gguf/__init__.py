"""A GGUF file as a base. It is read once, checked, and written as a plain folder that all other code reads."""
