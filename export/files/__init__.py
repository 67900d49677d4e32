"""Write and hash the exported files."""
