"""One small file a command; each imports what it runs only when it runs, so that `--help` is instant."""
