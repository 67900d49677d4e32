"""An evolution over stock shapes and index sets (arXiv 2409.17372)."""
