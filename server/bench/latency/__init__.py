"""`pat-bench latency` and `throughput`: one engine under a grid or a ladder of loads."""
