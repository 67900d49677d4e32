"""Stage 1: fine-tune a base model while its hidden dimension is pruned; writes run/ with a plan."""
