"""The machine that a command runs on."""
