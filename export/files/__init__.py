"""The exported files, written and hashed."""
