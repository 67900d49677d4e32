"""One small file a command. A file imports the stages only when its command runs, so that `--help` is instant."""
