"""`pat-bench equal-memory`: both models behind servers with the same memory, under the same load, with a verdict."""
