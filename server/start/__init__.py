"""From the command line to a running server: model, address and processes are checked, watched and ended."""
