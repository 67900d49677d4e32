"""`pat-bench speedup`: two engines take turns, and a claimed speed-up is judged."""
