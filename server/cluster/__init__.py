"""Replicas on a Ray cluster: `app` for Ray Serve's replicas, `proxy` for its HTTP proxies. Only `app` imports ray."""
