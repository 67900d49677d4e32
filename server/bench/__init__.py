"""What each command of pat-bench runs, the record that it leaves, and its table."""
