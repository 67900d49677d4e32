"""Between the socket and a route: who asks, within which bounds, how long, and what is told of it afterwards."""
