"""PAT: its modules, its schedule, its losses."""
