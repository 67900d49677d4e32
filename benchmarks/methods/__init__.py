"""Every method on one model, row by row: the table of docs/methods.md."""
