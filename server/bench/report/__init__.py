"""Recorded results as one HTML page and as flat rows."""
