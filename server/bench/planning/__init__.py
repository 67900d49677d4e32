"""How many engines a traffic needs, on paper: a queueing simulation on measured step times."""
