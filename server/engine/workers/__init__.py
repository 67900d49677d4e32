"""Engines in processes of their own, stepped by hand, and a watch on the machine meanwhile."""
