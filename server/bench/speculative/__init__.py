"""`pat-bench speculative`: the pruned model as the draft of its dense parent."""
