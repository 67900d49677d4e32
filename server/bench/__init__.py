"""The commands of pat-bench: what each runs, the record that it leaves, and its table."""
