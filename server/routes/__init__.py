"""The routes of ours: what each takes, gives and does."""
