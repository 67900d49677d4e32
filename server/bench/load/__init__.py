"""`pat-bench load`: any server under the requests of guidellm."""
