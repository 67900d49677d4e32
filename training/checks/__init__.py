"""Everything about a training that is checked before a weight is loaded."""
