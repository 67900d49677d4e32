"""Engines in processes of their own, stepped by hand, and what the machine does meanwhile."""
