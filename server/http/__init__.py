"""The way of a request between the socket and a route: its key, its bounds, its time, and what is recorded of it."""
