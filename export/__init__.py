"""Stage 2: rewrite the base by the plan as a standard narrower checkpoint, and prove that it is the same model."""
