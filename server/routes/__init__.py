"""Our own routes: what each takes, does and answers."""
