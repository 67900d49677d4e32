"""vLLM, and what knows it. The only folder that imports or patches it; it knows no HTTP."""
