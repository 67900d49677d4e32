"""Stage 3: serve a checkpoint with vLLM, and measure what was gained."""
