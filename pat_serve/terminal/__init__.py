"""Output on a terminal: progress bars, lines of news, and signs that the console can show."""
