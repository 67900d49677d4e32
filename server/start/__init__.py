"""The way from the command line to a running server, and to its end."""
